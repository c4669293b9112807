"""Derivatives beyond the gradient: second, many at once, forward-mode, and the transforms of ``torch.func``.

Each operator stands beside the same function in PyTorch's own operators, written here, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import dinov2_kernels as dk
from dinov2.models.dino_head import WeightNormLinear
from dinov2_kernels import PackedLayout
from dinov2_kernels.gelu import gelu_backward_
from dinov2_kernels.nn import Attention, Block, Mlp, SwiGLUFFN
from dinov2_kernels.residual import Connection, draw_subsets, residual_chain
from dinov2_kernels.swiglu import swiglu_backward_
from tests.process_group import in_processes

LAYOUT = PackedLayout([(2, 3), (1, 2)])
T, C, LENGTHS = LAYOUT.total_tokens, 6, [3, 3, 2]
TEMPERATURES = {"student_temperature": 0.3, "teacher_temperature": 0.2}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """A function of tensors, the same with PyTorch's own operators, and the tensors."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


# ------------------------------------------------------------------------------------------- with PyTorch's operators


def plain_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * value


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pieces = [
        torch.softmax(a.transpose(0, 1) @ b.permute(1, 2, 0) / a.shape[2] ** 0.5, dim=-1) @ c.transpose(0, 1)
        for a, b, c in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    ]
    return torch.cat([piece.transpose(0, 1) for piece in pieces])


def plain_koleo(x: Tensor) -> Tensor:
    unit = F.normalize(x, eps=1e-8, dim=-1)
    nearest = (unit @ unit.t() - 3 * torch.eye(len(x))).detach().argmax(dim=1)
    distance = ((unit - unit[nearest] + 1e-8) ** 2).sum(dim=1).sqrt()
    return -torch.log(distance + 1e-8).mean()


def plain_cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    return -(targets * torch.log_softmax(student / 0.3, dim=-1)).sum(dim=-1)


def plain_residual(x: Tensor, subset: dk.residual.Subset, residual: Callable[[Tensor], Tensor]) -> Tensor:
    if subset.rows is None:
        return x + residual(x)
    rows = subset.rows.long()
    return x.index_add(0, rows, subset.scale[:, None] * residual(x[rows]))


# ----------------------------------------------------------------------------------------------------- the operators


def swiglu() -> Case:
    return Case(dk.swiglu, plain_swiglu, (tensor(5, 2 * 3),))


def attention() -> Case:
    inputs = tuple(tensor(T, 2, 3, seed=seed) for seed in range(3))
    return Case(lambda q, k, v: dk.varlen_attention(q, k, v, LAYOUT), plain_attention, inputs)


def attention_by_offsets() -> Case:
    offsets = LAYOUT.cu_seqlens("cpu")
    return attention()._replace(ours=lambda q, k, v: dk.varlen_attention(q, k, v, offsets))


def related_attention() -> Case:
    """Keys and values are computed from queries: their gradients must not count twice."""

    def of(attention: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda q: attention(q, q.sin(), q * q)

    return Case(of(attention().ours), of(plain_attention), (tensor(T, 2, 3),))


def packed_attention() -> Case:
    ours, plain = dk.varlen_attention_qkvpacked, plain_attention
    return Case(lambda qkv: ours(qkv, LAYOUT), lambda qkv: plain(*qkv.unbind(1)), (tensor(T, 3, 2, 3),))


class Depth(nn.Module):
    """One residual connection; its branch is the sine."""

    def __init__(self, rate: float, *, with_norm: bool = True) -> None:
        super().__init__()
        (self.subset,) = draw_subsets(tensor(T, C), LAYOUT, [rate], torch.Generator().manual_seed(1))
        self.norm = nn.LayerNorm(C).double() if with_norm else None

    def forward(self, x: Tensor, gamma: Tensor, bias: Tensor) -> Tensor:
        options = {"subset": self.subset, "gamma": gamma, "bias": bias, "norm": self.norm}
        return dk.stochastic_depth(x, LAYOUT, lambda tokens, _: tokens.sin(), **options)

    def plain(self, x: Tensor, gamma: Tensor, bias: Tensor, weight: Tensor | None = None) -> Tensor:
        def residual(kept: Tensor) -> Tensor:
            normed = kept if weight is None else F.layer_norm(kept, (C,), weight)
            return gamma * (normed.sin() + bias)

        return plain_residual(x, self.subset, residual)


def stochastic_depth(rate: float) -> Case:
    depth = Depth(rate)

    def ours(x: Tensor, gamma: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(depth, {"norm.weight": weight}, (x, gamma, bias))

    return Case(ours, depth.plain, (tensor(T, C), *(tensor(C, seed=seed) for seed in range(3))))


def stochastic_depth_without_norm() -> Case:
    depth = Depth(0.5, with_norm=False)
    return Case(depth, depth.plain, (tensor(T, C), *(tensor(C, seed=seed) for seed in range(2))))


def chain(rate: float) -> Case:
    subsets = draw_subsets(tensor(T, C), LAYOUT, [rate, rate], torch.Generator().manual_seed(1))
    norms = [nn.LayerNorm(C).double() for _ in range(2)]

    def ours(x: Tensor, gamma: Tensor) -> Tensor:
        connections = [
            Connection(lambda tokens, layout: tokens.sin(), subset, norm, gamma)
            for subset, norm in zip(subsets, norms, strict=True)
        ]
        return residual_chain(x, LAYOUT, connections)

    def plain(x: Tensor, gamma: Tensor) -> Tensor:
        for subset, norm in zip(subsets, norms, strict=True):
            x = plain_residual(x, subset, lambda kept, norm=norm: gamma * norm(kept).sin())
        return x

    return Case(ours, plain, (tensor(T, C), tensor(C, seed=1)))


def koleo() -> Case:
    return Case(dk.koleo_loss, plain_koleo, (tensor(5, 4),))


def cross_entropy() -> Case:
    teacher, bias = tensor(4, 5, seed=8), tensor(5, seed=9)
    targets = torch.softmax(teacher / 0.2 + bias, dim=1)
    return Case(
        lambda x: dk.soft_cross_entropy(x, teacher, teacher_bias=bias, **TEMPERATURES),
        lambda x: plain_cross_entropy(x, targets),
        (tensor(4, 5),),
    )


def indexed_cross_entropy() -> Case:
    teacher, index, weight = tensor(2, 5, seed=8), torch.tensor([[0, 1], [1, 1], [1, 0], [0, 0]]), tensor(4, seed=7)
    targets = torch.softmax(teacher / 0.2, dim=1)[index].sum(dim=1)
    return Case(
        lambda x: dk.soft_cross_entropy(x, teacher, teacher_index=index, row_weight=weight, **TEMPERATURES),
        lambda x: weight * plain_cross_entropy(x, targets),
        (tensor(4, 5),),
    )


def prototype_cross_entropy() -> Case:
    teacher = tensor(4, 5, seed=8)
    targets = torch.softmax(teacher / 0.2, dim=1)
    return Case(
        lambda x, w, g: dk.prototype_cross_entropy(x, w, teacher, weight_gain=g, **TEMPERATURES),
        lambda x, w, g: plain_cross_entropy(x @ (g * F.normalize(w, dim=1)).t(), targets),
        (tensor(4, 3), tensor(5, 3, seed=1), tensor(5, 1, seed=2)),
    )


def weight_norm() -> Case:
    layer, x = WeightNormLinear(3, 5).double(), tensor(2, 3, seed=4)

    def ours(v: Tensor, g: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_v": v, "weight_g": g}, (x,))

    return Case(ours, lambda v, g: x @ (g * F.normalize(v, dim=1)).t(), (tensor(5, 3), tensor(5, 1, seed=1)))


def feed_forward(kind: type[nn.Module]) -> Case:
    torch.manual_seed(0)
    module = kind(C, 8).double()

    def plain(x: Tensor) -> Tensor:
        if kind is Mlp:
            return module.fc2(F.gelu(module.fc1(x)))
        return module.w3(plain_swiglu(module.w12(x)))

    return Case(module, plain, (tensor(T, C),))


def tied_feed_forward() -> Case:
    """Two layers with the same weights: the input of the second one depends on them, too."""
    torch.manual_seed(0)
    module = Mlp(C, 8).double()

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        parameters = {"fc1.weight": weight}
        return torch.func.functional_call(module, parameters, torch.func.functional_call(module, parameters, x))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(2):
            x = module.fc2(F.gelu(F.linear(x, weight, module.fc1.bias)))
        return x

    return Case(ours, plain, (tensor(T, C), tensor(8, C, seed=1)))


def block() -> Case:
    torch.manual_seed(0)
    module = Block(C, 2, qkv_bias=True, init_values=0.5).double()

    def plain(x: Tensor) -> Tensor:
        attention: Attention = module.attn
        qkv = attention.qkv(module.norm1(x)).unflatten(1, (3, 2, -1))
        x = x + module.ls1.gamma * attention.proj(plain_attention(*qkv.unbind(1)).flatten(1))
        return x + module.ls2.gamma * module.mlp.fc2(F.gelu(module.mlp.fc1(module.norm2(x))))

    return Case(lambda x: module(x, LAYOUT), plain, (tensor(T, C),))


CASES: dict[str, Callable[[], Case]] = {
    "swiglu": swiglu,
    "attention": attention,
    "attention by offsets": attention_by_offsets,
    "attention of related tensors": related_attention,
    "packed attention": packed_attention,
    "stochastic depth": lambda: stochastic_depth(0.5),
    "stochastic depth that drops nothing": lambda: stochastic_depth(0.0),
    "stochastic depth without a norm": stochastic_depth_without_norm,
    "chain": lambda: chain(0.5),
    "chain that drops nothing": lambda: chain(0.0),
    "koleo": koleo,
    "cross entropy": cross_entropy,
    "cross entropy with an index": indexed_cross_entropy,
    "prototype cross entropy": prototype_cross_entropy,
    "weight norm": weight_norm,
    "mlp": lambda: feed_forward(Mlp),
    "swiglu layer": lambda: feed_forward(SwiGLUFFN),
    "mlp with tied weights": tied_feed_forward,
    "block": block,
}


# ------------------------------------------------------------------------------------------------- the derivatives


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
