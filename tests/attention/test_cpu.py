"""The native CPU operators: every target this processor runs, values, strides, threads, and what they are made of."""

from __future__ import annotations

import math

import pytest
import torch

import dinov2_kernels as dk
from dinov2_kernels import PackedLayout, _library
from dinov2_kernels.attention import reference
from tests.attention.cases import CASES, DTYPES, LONG_CASES, Case, assert_matches_reference
from tests.cpu_targets import OTHER_TARGETS, run_value_tests

forward = torch.ops.dinov2_kernels.attention_forward
backward = torch.ops.dinov2_kernels.attention_backward

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert _library.OPERATORS["attention_forward"].has_native("cpu")
    assert _library.OPERATORS["attention_backward"].has_native("cpu")


@pytest.mark.usefixtures("poisoned_outputs")
@by_dtype
@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(forward, backward, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@by_dtype
@pytest.mark.parametrize("D", range(1, 129, 3))
def test_values_of_every_width(D: int, dtype: torch.dtype) -> None:
    assert_matches_reference(forward, backward, Case(((1, 31), (1, 1)), H=1, D=D), dtype, offsets=True)


@pytest.mark.usefixtures("poisoned_outputs")
@by_dtype
def test_values_with_offsets(dtype: torch.dtype) -> None:
    case = Case(((1, 3), (1, 0), (2, 17), (1, 65), (1, 0)), H=3)
    assert_matches_reference(forward, backward, case, dtype, offsets=True)


@by_dtype
def test_values_do_not_depend_on_strides(dtype: torch.dtype) -> None:
    case = Case(((2, 23), (1, 40)), H=3, D=20)
    qkv, grad = case.inputs(dtype)
    q, k, v = qkv.unbind(1)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k)]  # [T, H, D] of [H, T, D]
    wider = torch.cat([v, torch.full_like(v, math.nan)], dim=2)[..., :20]
    expected = forward(q, k, v, None, case.layout.flat_runs, 0.3)
    result = forward(*heads_first, wider, None, case.layout.flat_runs, 0.3)
    assert all(map(torch.equal, result, expected))
    expected_dqkv = backward(grad, q, k, v, *expected, None, case.layout.flat_runs, 0.3)
    assert torch.equal(backward(grad, *heads_first, wider, *expected, None, case.layout.flat_runs, 0.3), expected_dqkv)


@pytest.mark.parametrize("scale", [0.0, -0.4, 1.5])
def test_values_of_any_scale(scale: float) -> None:
    q, k, v = Case(((2, 33),)).inputs(torch.float32)[0].unbind(1)
    exact = reference.attention_forward(q.double(), k.double(), v.double(), None, (2, 33), scale)
    for result, expected in zip(forward(q, k, v, None, (2, 33), scale), exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=2e-5)


@by_dtype
def test_values_that_are_missing_stay_in_their_sequence(dtype: torch.dtype) -> None:
    layout = PackedLayout([(3, 9)])
    qkv, grad = Case(layout.runs, D=33).inputs(dtype)
    qkv[9:18, :, 1] = math.nan  # the second sequence, in the second head
    out, lse = forward(*qkv.unbind(1), None, layout.flat_runs, 0.2)
    dqkv = backward(grad, *qkv.unbind(1), out, lse, None, layout.flat_runs, 0.2)
    missing = torch.zeros(27, 2, dtype=torch.bool)
    missing[9:18, 1] = True
    assert torch.equal(out.isnan().all(dim=2), missing)
    assert torch.equal(out.isnan().any(dim=2), missing)
    assert torch.equal(lse.isnan().T, missing)
    assert torch.equal(dqkv.isnan().all(dim=(1, 3)), missing)
    assert torch.equal(dqkv.isnan().any(dim=(1, 3)), missing)


@by_dtype
def test_values_of_one_missing_query_stay_in_its_row(dtype: torch.dtype) -> None:
    qkv, _ = Case(((1, 40),), H=1).inputs(dtype)
    qkv[7, 0] = math.nan
    out, _ = forward(*qkv.unbind(1), None, (1, 40), 0.125)
    assert out.isnan().any(dim=2).nonzero().tolist() == [[7, 0]]


@by_dtype
@pytest.mark.parametrize("case", [Case(((30, 50), (4, 197))), Case(((1, 600),), H=3)], ids=str)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    qkv, grad = case.inputs(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, lse = forward(*qkv.unbind(1), None, case.layout.flat_runs, 0.125)
            dqkv = backward(grad, *qkv.unbind(1), out, lse, None, case.layout.flat_runs, 0.125)
            results.append((out, lse, dqkv))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)


@by_dtype
def test_public_functions_agree_with_pytorch(dtype: torch.dtype) -> None:
    layout = PackedLayout([(4, 50)])
    qkv = Case(layout.runs, H=6).inputs(dtype)[0].requires_grad_()
    q, k, v = (x.unflatten(0, (4, 50)).transpose(1, 2) for x in qkv.unbind(1))  # [S, H, N, D]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    result = dk.varlen_attention_qkvpacked(qkv, layout)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
    gradients = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (result, expected)]
    torch.testing.assert_close(*gradients, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": (1, 5)}, "the sequences have 5 tokens, but q has 6"),
        ({"runs": (1, -1, 1, 7)}, "expected sequences of 0 or more tokens, got -1"),
        ({"runs": (6,)}, "runs: expected"),
        ({"k": torch.zeros(6, 2, 7)}, "k: expected the shape of q"),
        ({"v": torch.zeros(6, 2, 8).half()}, "v: expected the dtype of q"),
        ({"v": torch.zeros(6, 8, 2).transpose(1, 2)}, "v: expected a dense last dimension"),
        ({name: torch.zeros(6, 2, 8).double() for name in "qkv"}, "q: expected float32, bfloat16 or float16"),
        ({name: torch.zeros(6, 2, 129) for name in "qkv"}, "q: expected heads of width 1 to 128, got 129"),
    ],
)
def test_kernels_refuse_what_they_cannot_compute(change: dict[str, object], message: str) -> None:
    x = torch.zeros(6, 2, 8)
    arguments = {"q": x, "k": x, "v": x, "cu_seqlens": None, "runs": (1, 6), "scale": 1.0}
    with pytest.raises(RuntimeError, match=message):
        forward(**(arguments | change))
