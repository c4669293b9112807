"""Our attention behind F.scaled_dot_product_attention and varlen_attn: values, gradients, what is left to PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_kernels import PackedLayout, varlen_attention
from dinov2_kernels.integrations import flash_attention, register_flash_attention
from tests.tolerance import assert_at_most_twice_the_error

SHAPES = [(2, 3, 7, 8), (1, 2, 50, 64), (3, 1, 1, 5), (2, 2, 17, 128)]
LENGTHS = (5, 1, 9, 3)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ours is active; the list receives the operators of ours that are called."""
    seen: list[str] = []
    for name in ("_forward", "_backward"):
        operator = getattr(flash_attention, name)

        def counted(*args: Any, name: str = name, operator: Any = operator) -> Any:
            seen.append(name.removeprefix("_"))
            return operator(*args)

        monkeypatch.setattr(flash_attention, name, counted)
    register_flash_attention()
    activate_flash_attention_impl("DINOV2")
    yield seen
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def as_linear_layers_give_them(B: int, H: int, N: int, D: int) -> list[Tensor]:
    """q, k, v [B, H, N, D] as views of [B, N, 3, H, D]."""
    return list(random(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0))


def one_by_one(B: int, H: int, N: int, D: int) -> list[Tensor]:
    return list(random(3, B, H, N, D).unbind(0))


def shared_by_the_batch(B: int, H: int, N: int, D: int) -> list[Tensor]:
    q, k, v = one_by_one(B, H, N, D)
    return [q, k[:1].expand_as(q), v[:1].expand_as(q)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


LAYOUTS = [as_linear_layers_give_them, one_by_one, shared_by_the_batch]


def results(function: Any, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """What the function returns, and the gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]  # keeps the strides
    out = function(*leaves, **options)
    direction = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, direction)]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.transpose(-1, -2) * scale).softmax(dim=-1) @ v


def assert_exact(found: list[Tensor], inputs: list[Tensor], **options: Any) -> None:
    plain = results(plain_attention, inputs, **options)
    with sdpa_kernel(SDPBackend.MATH):
        exact = results(F.scaled_dot_product_attention, [x.double() for x in inputs], **options)
    assert_at_most_twice_the_errors(found, plain, exact)


def assert_at_most_twice_the_errors(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    for name, result, by_hand, expected in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        floor = 16 * torch.finfo(torch.float32).eps * (1 + expected.abs().max().item())
        assert result.dtype == by_hand.dtype
        assert_at_most_twice_the_error(name, result, by_hand, expected, floor)


def ours(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The library's own function, on tokens [B N, H, D]."""
    B, H, N, D = q.shape
    tokens = [x.transpose(1, 2).reshape(B * N, H, D) for x in (q, k, v)]
    return varlen_attention(*tokens, PackedLayout([(B, N)]), scale=scale).view(B, N, H, D).transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(calls: list[str], shape: Any, layout: Any) -> None:
    inputs = layout(*shape)
    found = results(F.scaled_dot_product_attention, inputs)
    assert calls == ["forward", "backward"]
    assert_exact(found, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_precision_is_that_of_our_attention(calls: list[str], shape: Any, layout: Any, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in layout(*shape)]
    found = results(F.scaled_dot_product_attention, inputs)
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(found, results(ours, inputs), rtol=0, atol=0)


def test_scale(calls: list[str]) -> None:
    inputs = one_by_one(2, 2, 6, 8)
    found = results(F.scaled_dot_product_attention, inputs, scale=0.7)
    assert calls == ["forward", "backward"]
    assert_exact(found, inputs, scale=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_those_that_fake_kernels_promise(calls: list[str], layout: Any) -> None:
    """torch.compile lays out its memory by the fake kernels."""
    inputs = layout(2, 3, 7, 8)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    real = forward(*inputs)
    found = [*real, *backward(real[0], *inputs, *real, 0.0, False)]
    assert calls == ["forward", "backward"]
    with torch._subclasses.FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(x) for x in inputs]
        fake = forward(*fake_inputs)
        expected = [*fake, *backward(fake[0], *fake_inputs, *fake, 0.0, False)]
    for result, promised in zip(found, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (promised.shape, promised.stride(), promised.dtype)


def test_compiled(calls: list[str]) -> None:
    inputs = as_linear_layers_give_them(2, 2, 9, 16)
    compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sin(), fullgraph=True)
    found = results(compiled, inputs)
    assert calls == ["forward", "backward"]
    expected = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).sin(), inputs)
    torch.testing.assert_close(found, expected)


OTHERS = {
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), torch.float32, 8),
    "mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(6, 6).tril()),
        torch.float32,
        8,
    ),
    "float64": (F.scaled_dot_product_attention, torch.float64, 8),
    "wide heads": (F.scaled_dot_product_attention, torch.float32, 136),
    "fewer queries": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :4], k, v), torch.float32, 8),
    "fewer heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        torch.float32,
        8,
    ),
    "no tokens": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :0], k, v), torch.float32, 8),
}


@pytest.mark.parametrize(("function", "dtype", "width"), OTHERS.values(), ids=OTHERS)
def test_everything_else_is_left_to_pytorch(calls: list[str], function: Any, dtype: torch.dtype, width: int) -> None:
    inputs = [x.to(dtype) for x in one_by_one(2, 2, 6, width)]
    found = results(function, inputs)
    assert calls == []
    restore_flash_attention_impl()
    torch.testing.assert_close(found, results(function, inputs), rtol=0, atol=0)


def test_what_pytorch_does_not_have_either(calls: list[str]) -> None:
    q = random(8, 2, 4)
    offsets = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="aten::_flash_attention_forward: PyTorch has no kernel for CPU, and"):
        varlen_attn(q, q, q, offsets, offsets, 8, 8, window_size=(-1, 0))


def test_restore_brings_pytorch_back(calls: list[str]) -> None:
    inputs = one_by_one(2, 2, 6, 8)
    restore_flash_attention_impl()
    F.scaled_dot_product_attention(*inputs)
    assert calls == []
    activate_flash_attention_impl("DINOV2")
    F.scaled_dot_product_attention(*inputs)
    assert calls == ["forward"]


def test_backward_gets_the_log_sum_exps_of_forward(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for name, place in (("_forward", None), ("_backward", 5)):
        operator = getattr(flash_attention, name)

        def spied(*args: Any, name: str = name, place: int | None = place, operator: Any = operator) -> Any:
            result = operator(*args)
            seen[name] = result[1] if place is None else args[place]
            return result

        monkeypatch.setattr(flash_attention, name, spied)
    results(F.scaled_dot_product_attention, as_linear_layers_give_them(2, 3, 7, 8))
    torch.testing.assert_close(seen["_backward"], seen["_forward"], rtol=0, atol=0)
    with OnCPU():
        results(lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0], one_by_one(2, 3, 7, 8))
    torch.testing.assert_close(seen["_backward"], seen["_forward"], rtol=0, atol=0)


@pytest.mark.parametrize("ours_first", [True, False])
def test_either_backward_takes_what_either_forward_left(calls: list[str], ours_first: bool) -> None:
    inputs = [x.requires_grad_() for x in one_by_one(2, 2, 6, 8)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).square().sum(), inputs)
    calls.clear()
    if not ours_first:
        restore_flash_attention_impl()
    loss = F.scaled_dot_product_attention(*inputs).square().sum()
    if ours_first:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl("DINOV2")
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), expected)
    assert calls == (["forward"] if ours_first else ["backward"])


def test_nothing_happens_before_activation() -> None:
    register_flash_attention()
    assert "DINOV2" in list_flash_attention_impls()
    assert current_flash_attention_impl() is None


def test_pytorch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "restore_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"register_flash_attention: expected PyTorch 2\.11 or later, .*, got "):
        register_flash_attention()


# ---------------------------------------------------------------------------------------------------------- varlen_attn


def by_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sequences = zip(*(x.transpose(0, 1).split(LENGTHS, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*sequence) for sequence in sequences], dim=1).transpose(0, 1)


def offsets() -> Tensor:
    return torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_varlen_values_and_gradients(calls: list[str], dtype: torch.dtype) -> None:
    inputs = list(random(sum(LENGTHS), 3, 2, 8).to(dtype).unbind(1))
    cu_seqlens = offsets()
    found = results(lambda *qkv: varlen_attn(*qkv, cu_seqlens, cu_seqlens, max(LENGTHS), max(LENGTHS)), inputs)
    assert calls == ["forward", "backward"]
    expected = results(lambda *qkv: varlen_attention(*qkv, cu_seqlens), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if dtype == torch.float32:
        plain, exact = (results(by_sequence, [x.to(kind) for x in inputs]) for kind in (dtype, torch.float64))
        assert_at_most_twice_the_errors(found, plain, exact)


def test_varlen_log_sum_exps(calls: list[str]) -> None:
    q, k, v = random(sum(LENGTHS), 3, 2, 8).unbind(1)
    cu_seqlens = offsets()
    _, lse = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 9, 9, return_aux=AuxRequest(lse=True), scale=0.5)
    scores = [
        torch.einsum("ihd,jhd->hij", *pair) * 0.5 for pair in zip(q.split(LENGTHS), k.split(LENGTHS), strict=True)
    ]
    torch.testing.assert_close(lse, torch.cat([s.logsumexp(dim=-1) for s in scores], dim=1))  # [H, T]


def test_varlen_compiled(calls: list[str]) -> None:
    inputs = list(random(sum(LENGTHS), 3, 2, 8).unbind(1))
    cu_seqlens = offsets()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, 9, 9).sin()

    found = results(torch.compile(function, fullgraph=True), inputs)
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(found, results(function, inputs))


def test_other_offsets_of_keys_are_left_to_pytorch() -> None:
    q = random(sum(LENGTHS), 2, 8)
    arguments = (q, q, q, offsets(), offsets(), 9, 9, 0.0, False, False)
    assert flash_attention._varlen_forward(*arguments) is NotImplemented


# ------------------------------------------------------------------------ what serves CUDA tensors, on tensors of a CPU


class OnCPU(TorchDispatchMode):
    """PyTorch's dense flash attention has an operator of its own for CUDA; here it runs what ours registers for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        override = flash_attention._OVERRIDES["CUDA"].get(func._opname)
        return (override or func)(*args, **(kwargs or {}))


def not_dense(B: int, H: int, N: int, D: int) -> list[Tensor]:
    """Head dimensions that are not the innermost; on CPU, PyTorch runs no flash attention of them."""
    return list(random(3, B, H, D, N).transpose(-1, -2).unbind(0))


@pytest.mark.parametrize("layout", [*LAYOUTS, not_dense])
def test_values_and_gradients_of_what_serves_cuda(calls: list[str], layout: Any) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=0.4)[0]
        return out

    inputs = layout(2, 3, 7, 8)
    with OnCPU():
        found = results(attention, inputs)
    assert calls == ["forward", "backward"]
    assert_exact(found, inputs, scale=0.4)


@pytest.mark.parametrize("layout", [*LAYOUTS, not_dense])
def test_strides_of_what_serves_cuda(layout: Any) -> None:
    inputs = layout(2, 3, 7, 8)
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Any]:
        outputs = forward(q, k, v)
        out, lse, *_, state, offset, _ = outputs
        return [*outputs, *backward(out, q, k, v, out, lse, None, None, 7, 7, 0.0, False, state, offset)]

    with OnCPU():
        found = run(*inputs)
    expected = run(*(x.to("meta").as_strided(x.shape, x.stride()) for x in inputs))
    for result, promised in zip(found, expected, strict=True):
        if isinstance(result, Tensor):
            assert (result.shape, result.stride(), result.dtype) == (promised.shape, promised.stride(), promised.dtype)
        else:
            assert result == promised


def test_what_serves_cuda_leaves_the_rest_to_pytorch() -> None:
    q = random(2, 2, 6, 8)
    assert flash_attention._sdpa_forward(q, q, q, 0.1) is NotImplemented
    assert flash_attention._sdpa_forward(q, q, q, 0.0, True) is NotImplemented
    assert flash_attention._sdpa_forward(q, q, q, 0.0, False, True) is NotImplemented
    tokens, cu_seqlens = random(18, 2, 8), offsets()
    arguments = (tokens, tokens, tokens, cu_seqlens, cu_seqlens, 9, 9, 0.0, False, False)
    for options in (
        {"window_size_left": 3},
        {"alibi_slopes": q},
        {"seqused_k": q},
        {"block_table": q},
        {"num_splits": 1},
    ):
        assert flash_attention._varlen_forward(*arguments, **options) is NotImplemented
    assert flash_attention._varlen_forward(*arguments, window_size_left=-1, window_size_right=-1) is not NotImplemented
