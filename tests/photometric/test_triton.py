"""The Triton kernels against the reference in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.photometric import triton_kernel
from tests.photometric.cases import DTYPES, SMALL, Case, assert_matches_reference
from tests.triton_interpreter import exact_bfloat16, ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]


# A dtype changes nothing but how results are stored, so each case takes one of them; all take float32 below.
VALUES = [(case, DTYPES[n % len(DTYPES)]) for n, case in enumerate(SMALL)]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_bfloat16(monkeypatch)


@pytest.mark.parametrize(("case", "dtype"), VALUES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(triton_kernel.photometric, case, dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_values_in_the_arithmetic_of_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_matches_reference(triton_kernel.photometric, case, torch.float32)
