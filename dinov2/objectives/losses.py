"""Centring of the teacher: what keeps its targets from collapsing to one prototype or to the uniform distribution.

Either way is one bias per prototype: the targets are ``softmax(logits / temperature + bias)``, with bias [K] from
:class:`SoftmaxCentering` or :class:`SinkhornCentering`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.objectives.config import ObjectiveConfig
from dinov2_kernels import sinkhorn_bias, sinkhorn_biases
from dinov2_kernels._library import autocast_disabled


class SoftmaxCentering(nn.Module):
    """Subtracts a moving average of the teacher's logits (DINO, arXiv:2104.14294, section 3.1).

    ``center`` [K] is a buffer, so checkpoints hold it. The targets of a batch are made before :meth:`update` sees that
    batch: the centre of a step excludes the step's own logits.

    Args:
        num_prototypes: K, logits per row.
        momentum: part of the centre kept at each update.
        group: processes whose rows form one batch; None means this process alone.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.momentum = momentum
        self.group = group
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Bias [K] for teacher logits [B, K]."""
        return -self.center / temperature

    @torch.no_grad()
    def update(self, features: Tensor, prototypes: nn.Module) -> None:
        """Move the centre towards the mean logits of the rows of all processes; B may differ between them and be 0.

        Logits are linear in the features, so their mean is ``prototypes`` of the mean feature: d numbers, not K, are
        reduced over the processes, and no logit is read again.

        Args:
            features: [B, d] features of the teacher's tokens.
            prototypes: linear layer without bias that makes logits [B, K] of them.
        """
        rows = self.center.new_full((1,), len(features))
        sums = torch.cat([features.sum(dim=0, dtype=self.center.dtype), rows])  # [d + 1]: one all-reduce for both
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        total, rows = sums[:-1], sums[-1:]
        with autocast_disabled(sums.device.type):
            mean: Tensor = prototypes(total / rows.clamp(min=1))  # [K]
        # Without any row there is no mean to move to. The row count stays on the device, so no if.
        self.center.lerp_(mean, (1 - self.momentum) * (rows > 0).to(mean.dtype))


class SinkhornCentering(nn.Module):
    """Balances each batch over the prototypes (SwAV, arXiv:2006.09882); remembers nothing between batches.

    Args:
        n_iterations: iterations of Sinkhorn-Knopp.
        group: processes whose rows form one batch; None means this process alone.
    """

    def __init__(self, n_iterations: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.n_iterations = n_iterations
        self.group = group

    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Bias [K] for teacher logits [B, K]; B may differ between processes and be 0."""
        return sinkhorn_bias(logits, temperature, n_iterations=self.n_iterations, group=self.group)

    def update(self, features: Tensor, prototypes: nn.Module) -> None:
        """Nothing to remember."""


Centering = SoftmaxCentering | SinkhornCentering


def biases_of(centerings: Sequence[Centering], logits: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The bias of each centring, all of one kind, for its logits; Sinkhorn-Knopp shares its reductions among them."""
    first = centerings[0]
    if isinstance(first, SinkhornCentering):
        return sinkhorn_biases(logits, temperature, n_iterations=first.n_iterations, group=first.group)
    return [centering(x, temperature) for centering, x in zip(centerings, logits, strict=True)]


def make_centering(config: ObjectiveConfig, num_prototypes: int, group: dist.ProcessGroup | None) -> Centering:
    """The centring that the configuration names, for logits [B, num_prototypes]."""
    if config.centering == "softmax":
        return SoftmaxCentering(num_prototypes, config.center_momentum, group)
    return SinkhornCentering(config.sinkhorn_iterations, group)
