"""The Triton kernels against the reference in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.swiglu import triton_kernel
from tests.swiglu.cases import CASES, DTYPES, Case, assert_matches_reference
from tests.triton_rounding import round_to_nearest

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs", "rounding"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # exp(1e4) gives a gate of 0
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(triton_kernel, case, dtype)
