"""The Triton kernels against the reference in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.cross_entropy import triton_kernel
from tests.cross_entropy.cases import CASES, DTYPES, Case, assert_matches_reference
from tests.triton_interpreter import exact_bfloat16, ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # exp of what starts at -3e38
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_bfloat16(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(triton_kernel, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_in_the_arithmetic_of_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_matches_reference(triton_kernel, case, torch.float32)


def test_values_of_two_dtypes() -> None:
    assert_matches_reference(triton_kernel, CASES[6], torch.float32, teacher_dtype=torch.bfloat16)
