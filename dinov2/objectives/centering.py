"""Centring of the teacher: what keeps its targets from collapsing to one prototype or to the uniform distribution.

Either way is one bias per prototype: the targets are ``softmax(logits / temperature + bias)``, with bias [K] from
:class:`SoftmaxCentering` or :class:`SinkhornCentering`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.objectives.config import ObjectiveConfig
from dinov2_kernels import sinkhorn_bias


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
    def update(self, logits: Tensor) -> None:
        """Move the centre towards the mean of logits [B, K] over the rows of all processes; B may differ and be 0."""
        rows = self.center.new_full((1,), len(logits))
        sums = torch.cat([logits.sum(dim=0, dtype=self.center.dtype), rows])  # [K + 1]: one all-reduce for both
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        total, rows = sums[:-1], sums[-1:]
        # Without any row there is no mean to move to. The row count stays on the device, so no if.
        self.center.lerp_(total / rows.clamp(min=1), (1 - self.momentum) * (rows > 0).to(total.dtype))


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

    def update(self, logits: Tensor) -> None:
        """Nothing to remember."""


def make_centering(
    config: ObjectiveConfig, num_prototypes: int, group: dist.ProcessGroup | None
) -> SoftmaxCentering | SinkhornCentering:
    """The centring that the configuration names, for logits [B, num_prototypes]."""
    if config.centering == "softmax":
        return SoftmaxCentering(num_prototypes, config.center_momentum, group)
    return SinkhornCentering(config.sinkhorn_iterations, group)
