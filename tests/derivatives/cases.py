"""Functions of tensors for the tests of derivatives: each operator beside the same in PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dinov2_kernels as dk
from dinov2.models.dino_head import WeightNormLinear
from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Attention, Block, Mlp, SwiGLUFFN
from dinov2_kernels.residual import Connection, draw_subsets, residual_chain

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
