"""The native CPU operators: every target this processor runs, values at the edges of exp, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_kernels import _library
from tests.cpu_targets import OTHER_TARGETS, run_value_tests
from tests.swiglu.cases import CASES, DTYPES, Case, assert_matches_reference, in_place

native = torch.ops.dinov2_kernels
SHAPES = (
    Case((16, 2 * 64)),  # whole vectors of every target
    Case((64, 2 * 15)),  # fewer columns than lanes
    Case((2, 3, 5, 2 * 17)),
    Case((300, 2 * 257)),  # rows of several threads
    Case((4, 2 * 1000), offset=3),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[name].has_native("cpu") for name in ("swiglu", "swiglu_backward", "swiglu_backward_"))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


def gates(dtype: torch.dtype) -> Tensor:
    """Gates where exp is large, tiny, subnormal and beyond the range of the dtype, and around 0."""
    ends = torch.linspace(-800, 800, 6401, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 6e4, -6e4], dtype=torch.float64)
    return torch.cat([ends, ends / 40, special]).to(dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_values_relative_to_each_result(dtype: torch.dtype) -> None:
    """Every result on its own scale: the tails of the sigmoid, e.g. silu(-60) = -5e-25, count as much as its middle."""
    gate = gates(dtype)
    ones = torch.ones_like(gate)
    x, s, rest = gate.double(), torch.sigmoid(gate.double()), torch.sigmoid(-gate.double())
    y, *gradients = (
        native.swiglu(torch.cat([gate, ones])),
        *native.swiglu_backward(ones, torch.cat([gate, ones])).chunk(2),
    )
    computed = torch.finfo(torch.promote_types(dtype, torch.float32))
    eps = max(torch.finfo(dtype).eps, 8 * computed.eps)
    smallest = 1e4 * torch.finfo(dtype).tiny  # results below it may lose digits, or all
    for result, terms in ((y, (x * s,)), (gradients[0], (s, x * s * rest)), (gradients[1], (x * s,))):
        scale = sum(term.abs() for term in terms)
        assert not result.isnan().any()
        assert ((result.double() - sum(terms)).abs() <= eps * scale + smallest).all()


def test_values_of_missing_and_infinite_inputs() -> None:
    x12 = torch.zeros(2, 40)
    x12[0, 3] = x12[1, 25] = torch.nan  # a gate, and a value
    x12[0, 4] = torch.inf
    x12[:, 20:].add_(1)
    for dtype in DTYPES:
        result = native.swiglu(x12.to(dtype))
        assert result.isnan().nonzero().tolist() == [[0, 3], [1, 5]]
        assert result[0, 4] == torch.inf
        gradient = native.swiglu_backward(torch.ones_like(result), x12.to(dtype))
        assert gradient[:, :20].isnan().nonzero().tolist() == [[0, 3], [0, 4], [1, 5]]  # inf * 0, as in the reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case((200, 1000)), Case((3, 70002)), Case((50000, 6))], ids=str)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    grad, x12 = case.tensors(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = in_place(native.swiglu_backward_, grad, x12)
            results.append([native.swiglu(x12), native.swiglu_backward(grad, x12), *again])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)
