"""The Triton kernels against the reference: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.sinkhorn import triton_kernel
from tests.sinkhorn.cases import CASES, DTYPES, Case, assert_infinite_and_missing_logits, assert_matches_reference
from tests.triton_interpreter import ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    # log 0 where there are no rows, inf - inf where logits are infinite
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(triton_kernel, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_in_the_arithmetic_of_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_matches_reference(triton_kernel, case, torch.float32)


def test_values_where_rows_share_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "MANY_ROWS", 1)
    assert_matches_reference(triton_kernel, Case(13, 127), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_values_where_a_program_owns_several_narrow_strips(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program owns several strips in pretraining, too. The tile of the narrowest strip does not hold 600 rows at
    once. Strips do not depend on the dtype, so the exact and the coarsest one are enough."""
    monkeypatch.setattr(triton_kernel, "PROGRAMS", 3)
    monkeypatch.setattr(triton_kernel, "L2_BYTES", 0)
    assert_matches_reference(triton_kernel, Case(600, 131, row_spread=30), dtype)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_values_of_infinite_and_missing_logits() -> None:
    assert_infinite_and_missing_logits(triton_kernel)


@pytest.mark.parametrize("B", [1, 128, 4900, 10**6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strips_fit_in_l2_or_are_as_narrow_as_memory_allows(B: int, dtype: torch.dtype) -> None:
    logits = torch.empty(B, 65536, dtype=dtype, device="meta")
    columns = triton_kernel._strip_columns(logits)
    row_bytes = columns * logits.element_size()
    assert row_bytes >= 32
    assert row_bytes == 32 or triton_kernel.PROGRAMS * B * row_bytes <= triton_kernel.L2_BYTES
