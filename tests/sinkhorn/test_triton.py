"""The Triton kernels against the reference: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.sinkhorn import triton_kernel
from tests.sinkhorn.cases import CASES, DTYPES, Case, assert_matches_reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow):RuntimeWarning"),  # log 0 where there are no rows
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(triton_kernel, case, dtype)


def test_values_where_rows_share_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "MANY_ROWS", 1)
    assert_matches_reference(triton_kernel, Case(13, 127), torch.float32)
