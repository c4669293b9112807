"""The Triton kernels against the reference in Triton's interpreter, and the whole loss on top of them."""

from __future__ import annotations

import pytest
import torch

import dinov2_kernels as dk
from dinov2_kernels.prototype_cross_entropy import chunked, triton_kernel
from tests.prototype_cross_entropy.cases import (
    CASES,
    DTYPES,
    Case,
    assert_matches_reference,
    gradients_of,
    with_logits_in_memory,
)
from tests.triton_interpreter import exact_bfloat16, ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    # exp(-inf) where a maximum follows the lowest number, and 0 times -inf beyond the columns, which is masked.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
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


@pytest.mark.parametrize("case", [Case(4, 4, 100, J=0), Case(5, 3, 100, J=2)], ids=str)
def test_loss_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under use_backend, the loop over chunks stays and its operators are Triton's."""
    monkeypatch.setattr(chunked, "columns_of_a_chunk", lambda *_: 32)
    arguments = case.loss_arguments(torch.float64, gain=True)
    with dk.use_backend("triton"):
        loss = dk.prototype_cross_entropy(**arguments)
        gradients = gradients_of(loss, arguments)
    expected = with_logits_in_memory(**arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, gradients_of(expected, arguments))
