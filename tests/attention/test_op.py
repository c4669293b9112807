"""Attention over packed sequences: values, gradients, compilation, and what it says to bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_kernels import PackedLayout, varlen_attention, varlen_attention_qkvpacked
from dinov2_kernels.attention import reference

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


def test_compiles_in_one_graph() -> None:
    layout = PackedLayout([(2, 5), (3, 2)])
    inputs = random_qkv(layout, 2, 8, torch.float32)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, layout), varlen_attention(*inputs, layout))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(10, 2, 8)] * 3, "layout describes 12 tokens, but q has 10"),
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


def test_bad_packed_shape() -> None:
    with pytest.raises(ValueError, match=r"qkv: expected shape \[T, 3, H, D\], got \[12, 2, 2, 8\]"):
        varlen_attention_qkvpacked(torch.zeros(12, 2, 2, 8), PackedLayout([(3, 4)]))
    with pytest.raises(ValueError, match="layout describes 12 tokens, but qkv has 11"):
        varlen_attention_qkvpacked(torch.zeros(11, 3, 2, 8), PackedLayout([(3, 4)]))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 12]), "expected offsets of dtype torch.int32"),
        (torch.tensor([], dtype=torch.int32), r"expected offsets of dtype torch.int32 and shape \[S \+ 1\]"),
        (torch.tensor([1, 12], dtype=torch.int32), "expected offsets that start at 0 and never decrease"),
        (torch.tensor([0, 7, 5, 12], dtype=torch.int32), "expected offsets that start at 0 and never decrease"),
        (torch.tensor([0, 7], dtype=torch.int32), "layout describes 7 tokens, but q has 12"),
    ],
)
def test_bad_offsets(offsets: Tensor, message: str) -> None:
    x = torch.zeros(12, 2, 8)
    with pytest.raises(ValueError, match=message):
        varlen_attention(x, x, x, offsets)
