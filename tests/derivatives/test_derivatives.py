"""Derivatives beyond the gradient: second, many at once, forward-mode, and the transforms of ``torch.func``.

They are compared with those of PyTorch's own operators, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

import dinov2_kernels as dk
from dinov2_kernels.gelu import gelu_backward_
from dinov2_kernels.nn import Block
from dinov2_kernels.swiglu import swiglu_backward_
from tests.derivatives.cases import (
    CASES,
    LAYOUT,
    TEMPERATURES,
    C,
    Case,
    T,
    chain,
    cross_entropy,
    packed_attention,
    tensor,
)
from tests.process_group import in_processes


def hessian_product(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Derivative of the squared length of the gradient, a gradient penalty."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs, create_graph=True)
    penalty = sum(gradient.pow(2).sum() for gradient in gradients)
    return list(torch.autograd.grad(penalty, inputs))


def batched_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    result = function(*inputs).flatten()
    return list(torch.autograd.grad(result, inputs, torch.eye(len(result)).double(), is_grads_batched=True))


def dual_numbers(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Forward-mode derivatives where nothing requires a gradient."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tensor(*x.shape, seed=5)) for x in inputs]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
        assert tangent is not None
        return [tangent]


def dual_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """A graph from outside; inside the level, the gradient of its result has a tangent."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    result = function(*inputs)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(result), tensor(*result.shape, seed=5))
        tangents = [forward_ad.unpack_dual(x).tangent for x in torch.autograd.grad(result, inputs, grad)]
        assert all(tangent is not None for tangent in tangents)
        return tangents


def jvp(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    tangents = tuple(tensor(*x.shape, seed=5) for x in inputs)
    return list(torch.func.jvp(function, inputs, tangents))


def grad(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    places = tuple(range(len(inputs)))
    return list(torch.func.grad(lambda *x: function(*x).pow(2).sum(), argnums=places)(*inputs))


def vmap(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.vmap(function)(*(torch.stack([x, x.flip(0), 2 * x]) for x in inputs))]


def vmap_of_one(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Only the last input has a batch."""
    *first, last = inputs
    dims = (*[None] * len(first), 0)
    return [torch.vmap(function, in_dims=dims)(*first, torch.stack([last, 2 * last]))]


def per_sample_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    each = torch.func.grad(lambda *x: function(*x).pow(2).sum())
    return [torch.vmap(each)(*(torch.stack([x, x.flip(0), 2 * x]) for x in inputs))]


def forward_over_reverse(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.func.hessian(lambda *x: function(*x).pow(2).sum())(*inputs)]


def reverse_over_reverse(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.func.jacrev(torch.func.jacrev(lambda *x: function(*x).pow(2).sum()))(*inputs)]


DERIVATIVES = [
    hessian_product,
    batched_gradients,
    dual_numbers,
    dual_gradients,
    jvp,
    grad,
    vmap,
    vmap_of_one,
    per_sample_gradients,
    forward_over_reverse,
    reverse_over_reverse,
]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name: str, derivative: Callable[..., list[Tensor]]) -> None:
    case = CASES[name]()
    results, expected = derivative(case.ours, case.inputs), derivative(case.plain, case.inputs)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-7, atol=1e-7)
    assert any(value.abs().max() > 1e-3 for value in expected)


@pytest.mark.parametrize("name", CASES)
def test_compiled_transform_equals_pytorch(name: str) -> None:
    case = CASES[name]()
    compiled = torch.compile(lambda *inputs: grad(case.ours, inputs), backend="aot_eager")
    for result, value in zip(compiled(*case.inputs), grad(case.plain, case.inputs), strict=True):
        torch.testing.assert_close(result, value, rtol=1e-7, atol=1e-7)


# Offsets in float64 run in plain PyTorch, which reads them on the host and so splits the graph.
@pytest.mark.parametrize("name", [name for name in CASES if name != "attention by offsets"])
def test_compiled_function_refuses_second_derivatives(name: str) -> None:
    case = CASES[name]()
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        hessian_product(torch.compile(case.ours, backend="aot_eager"), case.inputs)


def test_autocast_applies_to_transforms_too() -> None:
    x, t = tensor(T, 3, 2, 8).float(), tensor(T, 3, 2, 8, seed=1).float()
    attend, expected = packed_attention().ours, packed_attention().ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        value, tangent = torch.func.jvp(attend, (x,), (t,))
        assert value.dtype == tangent.dtype == attend(x).dtype == torch.bfloat16
        torch.testing.assert_close(value, attend(x), rtol=0.01, atol=0.01)
    torch.testing.assert_close(value.float(), expected, rtol=0.02, atol=0.02)


# ---------------------------------------------------------------------------------------------------------- refusals


def cross_entropy_that_overwrites() -> Case:
    case = cross_entropy()
    options = {"overwrite_student_logits": True, **TEMPERATURES}
    return case._replace(ours=lambda x: dk.soft_cross_entropy(2 * x, tensor(4, 5, seed=8), **options))


def depth_that_overwrites() -> Case:
    def ours(x: Tensor) -> Tensor:
        norm = nn.LayerNorm(C).double()
        return dk.stochastic_depth(2 * x, LAYOUT, lambda t, _: t.sin(), drop_rate=0.0, norm=norm, inplace=True)

    return chain(0.0)._replace(ours=ours, inputs=(tensor(T, C),))


def block_that_recomputes() -> Case:
    module = Block(C, 2, recompute=True).double()
    return Case(lambda x: module(x, LAYOUT), torch.sin, (tensor(T, C),))


@pytest.mark.parametrize("derivative", [hessian_product, batched_gradients, dual_gradients])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (cross_entropy_that_overwrites, "overwrite_student_logits=False"),
        (depth_that_overwrites, "inplace=False and recompute=False"),
        (block_that_recomputes, "inplace=False and recompute=False"),
    ],
)
def test_backward_that_kept_too_little_refuses(
    make: Callable[[], Case], options: str, derivative: Callable[..., list[Tensor]]
) -> None:
    case = make()
    with pytest.raises(RuntimeError, match=f"expected {options}, because"):
        derivative(case.ours, case.inputs)


@pytest.mark.parametrize("make", [depth_that_overwrites, block_that_recomputes])
def test_forward_mode_needs_nothing_that_backward_keeps(make: Callable[[], Case]) -> None:
    """Central differences in float64 have an error of about 1e-9 here."""
    torch.manual_seed(0)
    case = make()
    (x,), t, step = case.inputs, tensor(T, C, seed=5), 1e-5
    expected = (case.ours(x + step * t) - case.ours(x - step * t)) / (2 * step)
    torch.testing.assert_close(dual_numbers(case.ours, (x,)), [expected], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backward_", [swiglu_backward_, gelu_backward_])
def test_backward_operators_refuse_tensors_that_need_a_gradient(backward_: Callable[..., object]) -> None:
    """Autograd cannot record them, so a second derivative would miss their part."""
    z = tensor(3, 8).requires_grad_()
    grad = tensor(3, 4 if backward_ is swiglu_backward_ else 8)
    with pytest.raises(RuntimeError, match="expected tensors that need no gradient"):
        backward_(grad, z)
    backward_(grad, z.detach())


def _koleo_of_a_group(rank: int, world_size: int) -> None:
    x = tensor(4, 3, seed=rank)
    for derivative in (hessian_product, jvp, grad, vmap):
        with pytest.raises(NotImplementedError, match="group: expected None"):
            derivative(lambda x: dk.koleo_loss(x, group=dist.group.WORLD), (x,))


def test_koleo_refuses_a_group_beyond_gradients(tmp_path: Path) -> None:
    in_processes(1, tmp_path, _koleo_of_a_group)


def test_operators_without_gradient() -> None:
    """Their results are constants for autograd, in both modes, as their docstrings say."""
    x = tensor(5, 4).requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), tensor(5, 4, seed=5))
        for function in (
            lambda x: dk.sinkhorn_bias(x, 0.1),
            lambda x: dk.sinkhorn_knopp(x, 0.1),
            lambda x: dk.nearest_neighbors(x)[1],
        ):
            assert not function(x).requires_grad
            assert forward_ad.unpack_dual(function(dual)).tangent is None
    targets = {"teacher_bias": tensor(4).requires_grad_(), "row_weight": tensor(5).requires_grad_(), **TEMPERATURES}
    loss = dk.soft_cross_entropy(tensor(5, 4), x, **targets)
    assert not loss.requires_grad
