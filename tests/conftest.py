"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported


def _make_torchvision_importable() -> torch.library.Library | None:
    """Declare the operators that torchvision's Python code expects, if its compiled part does not load.

    A torchvision built for CUDA beside a CPU build of PyTorch cannot be imported, and then neither can timm or the
    vision models of transformers, though the tests need none of its operators.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_TORCHVISION = _make_torchvision_importable()  # its operators live as long as the library


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Fill all fresh memory with NaN, so that an element which a kernel never writes is seen."""
    # This fills uninitialised memory, whether Python or C++ asks for it. On a GPU it would also refuse what the
    # references are made of, cuBLAS among them, which here need not be the same bits in every run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
