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
from tests.sinkhorn.cases import CASES, DTYPES, SCHEMAS, Case, Operators, assert_matches_reference, operators_of

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


@pytest.mark.skipif(SANITIZE in os.environ, reason="this is the process that the test below started")
def test_the_sanitizers_find_nothing() -> None:
    """The values of the widest and the narrowest loads once more, in a process that starts under AddressSanitizer."""
    selection = "forward and (float64 or bfloat16) and not 37x264"  # the slowest case adds no other access
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, __file__]
    environment = {**cuda_shim.sanitizer_environment(), SANITIZE: "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{2 * (len(CASES) - 1)} passed" in result.stdout
