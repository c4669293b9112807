"""The Triton kernels against the reference in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.koleo import triton_kernel
from tests.koleo.cases import (
    CASES,
    DTYPES,
    Case,
    assert_a_nan_is_farthest,
    assert_matches_reference,
    assert_ties_go_to_the_lowest,
    operators_of,
)
from tests.triton_interpreter import exact_bfloat16, ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # of columns past the end of a row
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]

triton = operators_of(triton_kernel)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_bfloat16(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(triton, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_in_the_arithmetic_of_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_matches_reference(triton, case, torch.float32)


def test_ties() -> None:
    assert_ties_go_to_the_lowest(triton, torch.float32)


def test_ties_in_the_arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_ties_go_to_the_lowest(triton, torch.float32)


def test_nan() -> None:
    assert_a_nan_is_farthest(triton, torch.float32)
