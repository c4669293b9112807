"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Fill all fresh memory with NaN, so that an element which a kernel never writes is seen."""
    # This fills uninitialised memory, whether Python or C++ asks for it. On a GPU it would also refuse what the
    # references are made of, cuBLAS among them, which here need not be the same bits in every run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
