"""The CUDA C++ kernels against the reference, run on the CPU by tests/cuda_shim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import cuda_shim
from tests.koleo.cases import (
    CASES,
    DTYPES,
    SCHEMAS,
    Case,
    assert_a_nan_is_farthest,
    assert_matches_reference,
    assert_ties_go_to_the_lowest,
    operators_of,
)

SMALL_CASES = [case for case in CASES if case.B * case.world_size * case.D < 3000]
SANITIZE = "CUDA_SHIM_SANITIZE"  # set in the process that the last test starts


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    library = torch.library.Library(cuda_shim.NAMESPACE, "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    target = tmp_path_factory.mktemp("cuda") / "koleo.so"
    cuda_shim.build_operators(cuda_shim.CSRC / "koleo/cuda.cu", target, sanitize=SANITIZE in os.environ)
    torch.ops.load_library(target)
    yield operators_of(getattr(torch.ops, cuda_shim.NAMESPACE))
    library._destroy()


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype, operators: SimpleNamespace) -> None:
    assert_matches_reference(operators, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_threads_in_reverse(case: Case, operators: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_SHIM_ORDER", "reverse")
    assert_matches_reference(operators, case, torch.float32)


def test_ties(operators: SimpleNamespace) -> None:
    assert_ties_go_to_the_lowest(operators, torch.float32)


def test_nan(operators: SimpleNamespace) -> None:
    assert_a_nan_is_farthest(operators, torch.float32)


@pytest.mark.skipif(SANITIZE in os.environ, reason="this is the process that the test below started")
def test_the_sanitizers_find_nothing() -> None:
    """Values once more, in a process that starts under AddressSanitizer."""
    selection = "test_threads_in_reverse"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, __file__]
    environment = {**cuda_shim.sanitizer_environment(), SANITIZE: "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(SMALL_CASES)} passed" in result.stdout
