"""The projection head that turns a token into logits over prototypes."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.vision_transformer import init_linear
from dinov2_kernels import prototype_cross_entropy
from dinov2_kernels._autograd import KernelFunction, differentiably, in_pytorch, is_beyond_kernels
from dinov2_kernels._library import autocast_dtype
from dinov2_kernels._modules import refuse_script
from dinov2_kernels.prototype_cross_entropy.reference import prototypes_backward, prototypes_of

ROWS = 8192  # the gradient is computed for this many prototypes at a time, to keep intermediate results small


class DINOHead(nn.Module):
    """MLP, L2 normalisation, and the cosines to K prototypes (DINO, arXiv:2104.14294, section 3.1).

    Each cosine is multiplied by a trainable factor of its prototype. The factors start at 1. There is no batch norm.

    Args:
        in_dim: width D of the tokens.
        out_dim: number K of prototypes.
        hidden_dim: width between the linear layers.
        bottleneck_dim: width of the normalised features.
        num_layers: number of linear layers of the MLP, at least 1.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        sizes = {
            "in_dim": in_dim,
            "out_dim": out_dim,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.mlp = _mlp([in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim])
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all parameters anew, for instance after building the head on the meta device."""
        self.mlp.apply(init_linear)
        self.last_layer.reset_parameters()

    def features(self, x: Tensor) -> Tensor:
        """x: [..., D] tokens; returns normalised features [..., bottleneck], which are compared with the prototypes."""
        x = self.mlp(x)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12  # 1e-12 rounds to 0 in float16
        return F.normalize(x, dim=-1, eps=eps)

    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] tokens; returns logits over the prototypes [..., K]."""
        scores: Tensor = self.last_layer(self.features(x))
        return scores


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are g * v / |v| (Salimans and Kingma, arXiv:1602.07868).

    Both g (``weight_g`` [out, 1]) and v (``weight_v`` [out, in]) are trained.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set g to 1 and draw v as the weight of an ``nn.Linear``."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=sqrt(5))

    def weight(self) -> Tensor:
        """The weight g * v / |v| [out, in]; under autocast, it has autocast's dtype."""
        weight: Tensor = differentiably(_WeightNorm, self.weight_v, self.weight_g, autocast_dtype(self.weight_v))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]; returns [..., out]."""
        return F.linear(x, self.weight())

    def cross_entropy(self, x: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
        """Loss [N] of the logits ``self(x)`` [N, out], without storing them: see :func:`prototype_cross_entropy`.

        Args:
            x: [N, in].
            teacher_logits: [M, out].
            options: the other arguments of :func:`dinov2_kernels.prototype_cross_entropy`.
        """
        return prototype_cross_entropy(x, self.weight_v, teacher_logits, weight_gain=self.weight_g, **options)


class _WeightNorm(KernelFunction):
    """Weight normalisation that stores only its arguments. Autograd would also store v / |v|."""

    definition = staticmethod(prototypes_of)

    @staticmethod
    def forward(v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        """v: [K, d]; g: [K, 1]; returns [K, d] in ``dtype``."""
        return prototypes_of(v, g, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        v, g, _ = inputs
        ctx.save_for_backward(v, g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, g = ctx.saved_tensors
        if is_beyond_kernels(grad):
            return *in_pytorch(prototypes_backward, grad, v, g), None
        dv, dg = torch.empty_like(v), torch.empty_like(g)
        for start in range(0, len(v), ROWS):
            rows = slice(start, start + ROWS)
            dv[rows], dg[rows] = prototypes_backward(grad[rows], v[rows], g[rows])
        return dv, dg, None


def _mlp(widths: list[int]) -> nn.Module:
    """Linear layers of these widths, with GELUs between them; a single layer is not wrapped in a Sequential."""
    layers: list[nn.Module] = []
    for in_features, out_features in pairwise(widths):
        layers += [nn.Linear(in_features, out_features), nn.GELU()]
    return nn.Sequential(*layers[:-1]) if len(layers) > 2 else layers[0]
