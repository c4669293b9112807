"""Attention over packed sequences: values, gradients, compilation, and what it says to bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinov2_kernels import PackedLayout, varlen_attention, varlen_attention_qkvpacked
from dinov2_kernels.attention import op, reference

LAYOUTS = {
    "one run": [(3, 7)],
    "global and local crops": [(2, 17), (4, 5)],
    "single tokens": [(5, 1), (1, 3)],
    "empty runs and empty sequences": [(0, 4), (2, 0), (2, 3), (1, 0)],
}


def random_qkv(layout: PackedLayout, heads: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(layout.total_tokens + width)
    size = (layout.total_tokens, heads, width)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


@pytest.mark.parametrize("width", [1, 5, 64, 80])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(runs: list[tuple[int, int]], width: int) -> None:
    layout = PackedLayout(runs)
    expected_inputs = [x.requires_grad_() for x in random_qkv(layout, 2, width)]
    inputs = [x.detach().clone().requires_grad_() for x in expected_inputs]
    expected = reference.varlen_attention(*expected_inputs, layout.lengths, width**-0.5)
    result = varlen_attention(*inputs, layout)
    torch.testing.assert_close(result, expected)

    direction = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    expected_gradients = torch.autograd.grad(expected, expected_inputs, direction)
    torch.testing.assert_close(torch.autograd.grad(result, inputs, direction), expected_gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(dtype: torch.dtype) -> None:
    layout = PackedLayout([(2, 50), (3, 17)])
    inputs = random_qkv(layout, 2, 64, dtype)
    exact = reference.varlen_attention(*(x.double() for x in inputs), layout.lengths, 0.125)
    plain = reference.varlen_attention(*inputs, layout.lengths, 0.125)
    error = (varlen_attention(*inputs, layout).double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max()


def test_scale() -> None:
    layout = PackedLayout([(2, 6)])
    inputs = random_qkv(layout, 2, 8)
    expected = reference.varlen_attention(*inputs, layout.lengths, 0.7)
    torch.testing.assert_close(varlen_attention(*inputs, layout, scale=0.7), expected)


def test_offsets_and_layout_are_the_same() -> None:
    layout = PackedLayout([(2, 6), (1, 0), (1, 3)])
    inputs = random_qkv(layout, 2, 8)
    result = varlen_attention(*inputs, layout.cu_seqlens("cpu"))
    torch.testing.assert_close(result, varlen_attention(*inputs, layout), rtol=0, atol=0)


def test_packed_queries_keys_and_values() -> None:
    layout = PackedLayout([(2, 6), (3, 2)])
    inputs = random_qkv(layout, 2, 8)
    packed = torch.stack(inputs, dim=1)
    result = varlen_attention_qkvpacked(packed, layout, scale=0.5)
    torch.testing.assert_close(result, varlen_attention(*inputs, layout, scale=0.5))


def test_no_tokens() -> None:
    q = torch.zeros(0, 2, 8, requires_grad=True)
    result = varlen_attention(q, q, q, PackedLayout([]))
    assert result.shape == (0, 2, 8)
    result.sum().backward()
    assert q.grad is not None


def test_sequences_do_not_see_each_other() -> None:
    layout = PackedLayout([(2, 4), (1, 3)])
    inputs = [x.clone() for x in random_qkv(layout, 1, 8)]
    for x in inputs:
        x[4:8] = torch.nan
    result = varlen_attention(*inputs, layout)
    assert result[4:8].isnan().all()
    assert result[:4].isfinite().all()
    assert result[8:].isfinite().all()


def test_gradcheck() -> None:
    layout = PackedLayout([(2, 3), (1, 2)])
    inputs = [x.requires_grad_() for x in random_qkv(layout, 2, 3)]
    assert torch.autograd.gradcheck(lambda *qkv: varlen_attention(*qkv, layout), inputs)
    packed = torch.stack([x.detach() for x in inputs], dim=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: varlen_attention_qkvpacked(qkv, layout), packed)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_opcheck(runs: list[tuple[int, int]], width: int) -> None:
    layout = PackedLayout(runs)
    q, k, v = torch.stack(random_qkv(layout, 2, width, torch.float32), dim=1).unbind(1)
    ops = torch.ops.dinov2_kernels
    for sequences in ((None, layout.flat_runs), (layout.cu_seqlens("cpu"), ())):
        arguments = (q, k, v, *sequences, 0.125)
        out, lse = ops.attention_forward(*arguments)
        torch.library.opcheck(ops.attention_forward.default, arguments)
        torch.library.opcheck(ops.attention_backward.default, (out.cos(), q, k, v, out, lse, *sequences, 0.125))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend: str, packed: bool) -> None:
    torch._dynamo.reset()
    layout = PackedLayout([(2, 5), (3, 2)])

    def attend(qkv: Tensor) -> Tensor:
        if packed:
            return varlen_attention_qkvpacked(qkv, layout)
        return varlen_attention(*qkv.unbind(1), layout)

    qkv = torch.stack(random_qkv(layout, 2, 8, torch.float32), dim=1).requires_grad_()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    result, expected = compiled(qkv), attend(qkv)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(y.sin().sum(), qkv)[0] for y in (result, expected)]
    torch.testing.assert_close(*gradients)


def test_offsets_compile_in_one_graph() -> None:
    torch._dynamo.reset()
    layout = PackedLayout([(2, 5), (3, 2)])
    inputs = random_qkv(layout, 2, 8, torch.float32)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, layout.cu_seqlens("cpu")), varlen_attention(*inputs, layout))


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_computes_in_its_dtype(packed: bool) -> None:
    layout = PackedLayout([(2, 5)])
    qkv = torch.stack(random_qkv(layout, 2, 8, torch.float32), dim=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = varlen_attention_qkvpacked(qkv, layout) if packed else varlen_attention(*qkv.unbind(1), layout)
    expected = varlen_attention_qkvpacked(qkv.bfloat16(), layout)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    (gradient,) = torch.autograd.grad(result.float().sum(), qkv)
    assert gradient.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen_attention_qkvpacked(qkv.double(), layout).dtype == torch.float64


def test_activation_checkpointing() -> None:
    layout = PackedLayout([(2, 5), (1, 3)])
    qkv = torch.stack(random_qkv(layout, 2, 8, torch.float32), dim=1).requires_grad_()

    def attend(qkv: Tensor) -> Tensor:
        return varlen_attention_qkvpacked(qkv.sin(), layout)

    results = [attend(qkv), checkpoint(attend, qkv, use_reentrant=False)]
    gradients = [torch.autograd.grad(y.square().sum(), qkv)[0] for y in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_gradient_of_packed_inputs_is_packed() -> None:
    layout = PackedLayout([(2, 5)])
    qkv = torch.stack(random_qkv(layout, 2, 8, torch.float32), dim=1).requires_grad_()
    varlen_attention_qkvpacked(qkv, layout).sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    layout = PackedLayout([(3, 4)])
    inputs = random_qkv(layout, 3, 16, dtype)
    expected = varlen_attention(*inputs, layout)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    torch.testing.assert_close(varlen_attention(*heads_first, layout), expected, rtol=0, atol=0)
    width_first = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in inputs]
    torch.testing.assert_close(varlen_attention(*width_first, layout), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
def test_wide_heads_run_in_plain_pytorch_with_one_warning() -> None:
    op._warn_once.cache_clear()
    layout = PackedLayout([(2, 5)])
    inputs = random_qkv(layout, 1, 160, torch.float32)
    with pytest.warns(UserWarning, match="no attention kernel for heads of width 160 in torch.float32"):
        result = varlen_attention(*inputs, layout)
    torch.testing.assert_close(result, reference.varlen_attention(*inputs, layout.lengths, 160**-0.5))
    varlen_attention(*inputs, layout)  # says it no second time


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(10, 2, 8)] * 3, "q: expected 12 tokens, as the layout describes, got 10"),
        ([(12, 16)] * 3, r"q: expected shape \[T, H, D\], got \[12, 16\]"),
        ([(12, 2, 8), (12, 2, 4), (12, 2, 8)], r"k: expected the shape of q, \[12, 2, 8\], got \[12, 2, 4\]"),
        ([(12, 2, 8), (12, 2, 8), (11, 2, 8)], r"v: expected the shape of q, \[12, 2, 8\], got \[11, 2, 8\]"),
    ],
)
def test_bad_shapes(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varlen_attention(*(torch.zeros(shape) for shape in shapes), PackedLayout([(3, 4)]))


def test_bad_types() -> None:
    layout = PackedLayout([(3, 4)])
    x = torch.zeros(12, 2, 8)
    with pytest.raises(TypeError, match=r"v: expected the dtype of q, torch.float32, got torch.float16"):
        varlen_attention(x, x, x.half(), layout)
    with pytest.raises(TypeError, match=r"q: expected a floating-point tensor, got torch.int64"):
        varlen_attention(x.long(), x.long(), x.long(), layout)
    with pytest.raises(TypeError, match="layout: expected a PackedLayout or a tensor of offsets, got list"):
        varlen_attention(x, x, x, [(3, 4)])  # type: ignore[arg-type]


def test_bad_devices() -> None:
    layout = PackedLayout([(3, 4)])
    x = torch.zeros(12, 2, 8)
    with pytest.raises(ValueError, match="k: expected the device of q, cpu, got meta"):
        varlen_attention(x, x.to("meta"), x, layout)
    with pytest.raises(ValueError, match="layout: expected offsets on the device of q, cpu, got meta"):
        varlen_attention(x, x, x, layout.cu_seqlens("cpu").to("meta"))


def test_no_heads() -> None:
    with pytest.raises(ValueError, match=r"q: expected at least one head of width 1 or more, got \[12, 0, 8\]"):
        varlen_attention(*[torch.zeros(12, 0, 8)] * 3, PackedLayout([(3, 4)]))
    with pytest.raises(TypeError, match=r"qkv: expected a floating-point tensor, got torch.int64"):
        varlen_attention_qkvpacked(torch.zeros(12, 3, 2, 8).long(), PackedLayout([(3, 4)]))


def test_bad_packed_shape() -> None:
    with pytest.raises(ValueError, match=r"qkv: expected shape \[T, 3, H, D\], got \[12, 2, 2, 8\]"):
        varlen_attention_qkvpacked(torch.zeros(12, 2, 2, 8), PackedLayout([(3, 4)]))
    with pytest.raises(ValueError, match="qkv: expected 12 tokens, as the layout describes, got 11"):
        varlen_attention_qkvpacked(torch.zeros(11, 3, 2, 8), PackedLayout([(3, 4)]))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 12]), "expected offsets of dtype torch.int32"),
        (torch.tensor([], dtype=torch.int32), r"expected offsets of dtype torch.int32 and shape \[S \+ 1\]"),
        (torch.tensor([1, 12], dtype=torch.int32), "expected offsets that start at 0 and never decrease"),
        (torch.tensor([0, 7, 5, 12], dtype=torch.int32), "expected offsets that start at 0 and never decrease"),
        (torch.tensor([0, 7], dtype=torch.int32), "layout: expected offsets that end at the 12 tokens of q, got 7"),
    ],
)
def test_bad_offsets(offsets: Tensor, message: str) -> None:
    x = torch.zeros(12, 2, 8)
    with pytest.raises(ValueError, match=message):
        varlen_attention(x, x, x, offsets, validate=True)
    with pytest.raises(ValueError, match=message):  # offsets on a CPU are read without being asked
        varlen_attention(x, x, x, offsets)
