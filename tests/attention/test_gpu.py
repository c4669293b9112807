"""The Triton kernels on a GPU: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import PackedLayout, varlen_attention_qkvpacked
from dinov2_kernels.attention import reference, triton_kernel
from tests.attention.cases import CASES, DTYPES, LONG_CASES, Case, assert_matches_reference
from tests.pairs import pairs

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

OPERATORS = (triton_kernel.attention_forward, triton_kernel.attention_backward)
CROPS = PackedLayout([(8, 257), (32, 50), (2, 1374)])


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES, LONG_CASES), ids=str)
def test_values(case: Case, dtype: torch.dtype, offsets: bool) -> None:
    assert_matches_reference(*OPERATORS, case, dtype, "cuda", offsets=offsets)


@pytest.mark.parametrize(
    ("D", "dtype"), [*((D, torch.bfloat16) for D in (32, 64, 80, 128)), (64, torch.float32)], ids=str
)
@pytest.mark.parametrize("length", [16, 32, 64, 80, 128, 144, 201, 257, 300])
def test_every_tile(length: int, D: int, dtype: torch.dtype) -> None:
    assert_matches_reference(*OPERATORS, Case(((3, length),), D=D), dtype, "cuda")


def test_a_ragged_batch() -> None:
    case = Case(PackedLayout.from_lengths(range(1, 400, 3)).runs, H=3)
    for offsets in (False, True):
        assert_matches_reference(*OPERATORS, case, torch.bfloat16, "cuda", offsets=offsets)


@pytest.mark.parametrize("offsets", [False, True])
def test_sequences_do_not_see_each_other(offsets: bool) -> None:
    layout = PackedLayout([(2, 50), (2, 257), (2, 300)])
    qkv, grad = Case(layout.runs).inputs(torch.bfloat16, "cuda")
    expected = _gradient(qkv, grad, layout, offsets)
    poisoned = torch.cat([torch.arange(50, 100), torch.arange(357, 614), torch.arange(914, 1214)]).cuda()
    qkv[poisoned], grad[poisoned] = torch.nan, torch.nan
    result = _gradient(qkv, grad, layout, offsets)
    is_poisoned = torch.zeros(layout.total_tokens, dtype=torch.bool, device="cuda").index_fill_(0, poisoned, True)
    assert torch.equal(result[~is_poisoned], expected[~is_poisoned])
    torch.testing.assert_close(result[is_poisoned], torch.full_like(result[is_poisoned], torch.nan), equal_nan=True)


@pytest.mark.parametrize("offsets", [False, True])
def test_results_do_not_change_from_run_to_run(offsets: bool) -> None:
    qkv, grad = Case(CROPS.runs, H=6).inputs(torch.bfloat16, "cuda")
    expected = _gradient(qkv, grad, CROPS, offsets)
    for _ in range(10):
        assert torch.equal(_gradient(qkv, grad, CROPS, offsets), expected)


@pytest.mark.parametrize("offsets", [False, True])
def test_graph_capture_and_replay(offsets: bool) -> None:
    qkv, grad = Case(CROPS.runs, H=6).inputs(torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _gradient(qkv, grad, CROPS, offsets)  # compile, and plan the launches
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _gradient(qkv, grad, CROPS, offsets)
    qkv.copy_(qkv.flip(0))
    graph.replay()
    assert torch.equal(result, _gradient(qkv, grad, CROPS, offsets))


@pytest.mark.large
def test_compiles_in_one_graph() -> None:
    qkv, grad = Case(CROPS.runs, H=6).inputs(torch.bfloat16, "cuda")
    results = []
    for function in (varlen_attention_qkvpacked, torch.compile(varlen_attention_qkvpacked, fullgraph=True)):
        inputs = qkv.clone().requires_grad_()
        out = function(inputs, CROPS)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.large
@pytest.mark.parametrize("length", [50, 257, 1374])
def test_more_than_two_to_the_31_elements(length: int) -> None:
    H, D = 16, 64
    count = 2**31 // (3 * H * D * length) + 2
    layout = PackedLayout([(count, length)])
    qkv = torch.randn(layout.total_tokens, 3, H, D, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn(layout.total_tokens, H, D, dtype=torch.bfloat16, device="cuda")
    last = slice(-length, None)
    expected = _gradient(qkv[last].clone(), grad[last].clone(), PackedLayout([(1, length)]), False)
    for offsets in (False, True):
        result = _gradient(qkv, grad, layout, offsets)[last]
        torch.testing.assert_close(result, expected, atol=0.05, rtol=0.05)
    plain, _ = reference.attention_forward(*qkv[last].unbind(1), None, (1, length), D**-0.5)
    result, _ = triton_kernel.attention_forward(*qkv.unbind(1), None, layout.flat_runs, D**-0.5)
    torch.testing.assert_close(result[last], plain, atol=0.02, rtol=0.02)


def _gradient(qkv: torch.Tensor, grad: torch.Tensor, layout: PackedLayout, offsets: bool) -> torch.Tensor:
    """Forward and backward: dqkv [T, 3, H, D]."""
    sequences = (layout.cu_seqlens("cuda"), ()) if offsets else (None, layout.flat_runs)
    scale = qkv.shape[-1] ** -0.5
    out, lse = triton_kernel.attention_forward(*qkv.unbind(1), *sequences, scale)
    return triton_kernel.attention_backward(grad, *qkv.unbind(1), out, lse, *sequences, scale)
