"""The CUDA C++ kernels against the reference, run on the CPU by tests/cuda_shim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import cuda_shim
from tests.sinkhorn.cases import (
    CASES,
    DTYPES,
    SCHEMAS,
    Case,
    Operators,
    assert_infinite_and_missing_logits,
    assert_matches_reference,
    operators_of,
)

ALIGNED = (Case(3, 8), Case(13, 512), Case(24, 96, row_spread=8))  # what clusters take, where the device has them
SANITIZE = "CUDA_SHIM_SANITIZE"  # set in the process that the last test starts


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operators]:
    library = torch.library.Library(cuda_shim.NAMESPACE, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    target = tmp_path_factory.mktemp("cuda") / "sinkhorn.so"
    cuda_shim.build_operators(cuda_shim.CSRC / "sinkhorn/cuda.cu", target, sanitize=SANITIZE in os.environ)
    torch.ops.load_library(target)
    yield operators_of(cuda_shim.NAMESPACE)
    library._destroy()


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(
    case: Case, dtype: torch.dtype, order: str, operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_SHIM_ORDER", order)
    assert_matches_reference(operators, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_values_without_clusters(
    case: Case, dtype: torch.dtype, operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_SHIM_CAPABILITY", "80")
    assert_matches_reference(operators, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [16520, 32776])
def test_values_of_rows_spread_over_clusters(K: int, dtype: torch.dtype, operators: Operators) -> None:
    """Over 4 blocks of 8192 bfloat16, over 16 of 2048 float64, and too long for these."""
    assert_matches_reference(operators, Case(5 if K < 20000 else 1, K), dtype)


def test_values_of_infinite_and_missing_logits(operators: Operators) -> None:
    assert_infinite_and_missing_logits(operators)


@pytest.mark.skipif(SANITIZE in os.environ, reason="this is the process that the test below started")
def test_the_sanitizers_find_nothing() -> None:
    """The values of the widest and the narrowest loads once more, in a process that starts under AddressSanitizer."""
    # The slowest cases add no other access.
    slow = "37x264 or 32776 or 16520-torch.float64"
    selection = f"(forward or clusters) and (float64 or bfloat16) and not ({slow})"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, __file__]
    environment = {**cuda_shim.sanitizer_environment(), SANITIZE: "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{2 * (len(CASES) - 1 + len(ALIGNED)) + 1} passed" in result.stdout
