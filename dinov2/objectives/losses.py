"""The teacher's targets and the losses against them: centring, cross-entropy over the prototypes.

Centring prevents a collapse of the targets to one prototype or to the uniform distribution. Both ways of centring are
one bias per prototype: the targets are ``softmax(logits / temperature + bias)``, with bias [K] from
:class:`SoftmaxCentering` or :class:`SinkhornCentering`. The targets are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.objectives.config import ObjectiveConfig, StudentLogits
from dinov2.objectives.networks import Projected, logits_of
from dinov2_kernels import sinkhorn_bias, sinkhorn_biases, soft_cross_entropy
from dinov2_kernels._library import autocast_disabled


class SoftmaxCentering(nn.Module):
    """Subtracts a moving average of the teacher's logits (DINO, arXiv:2104.14294, section 3.1).

    ``center`` [K] is a buffer, so checkpoints contain it. The targets of a batch are computed before :meth:`update`
    sees the batch, so the centre of a step does not include the step's own logits.

    Args:
        num_prototypes: number K of prototypes.
        momentum: part of the centre that each update keeps.
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
        """Move the centre towards the mean logits of all processes. B may differ between processes and be 0.

        Logits are linear in the features, so their mean is ``prototypes`` of the mean feature. The all-reduce therefore
        takes d numbers instead of K, and the logits are not read again.

        Args:
            features: [B, d] features of the teacher's tokens.
            prototypes: linear layer without bias that turns features into logits [B, K].
        """
        rows = self.center.new_full((1,), len(features))
        sums = torch.cat([features.sum(dim=0, dtype=self.center.dtype), rows])  # [d + 1]: one all-reduce for both
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        total, rows = sums[:-1], sums[-1:]
        with autocast_disabled(sums.device.type):
            mean: Tensor = prototypes(total / rows.clamp(min=1))  # [K]
        # Without rows there is no mean, and the centre stays. The row count is on the device, so this is no if.
        self.center.lerp_(mean, (1 - self.momentum) * (rows > 0).to(mean.dtype))


class SinkhornCentering(nn.Module):
    """Balances each batch over the prototypes (SwAV, arXiv:2006.09882); it has no state between batches.

    Args:
        n_iterations: number of Sinkhorn-Knopp iterations.
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
        """Do nothing, because there is no state."""


Centering = SoftmaxCentering | SinkhornCentering


def biases_of(centerings: Sequence[Centering], logits: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The bias of each centring for its logits. All are of one kind; Sinkhorn-Knopp shares its all-reduces."""
    first = centerings[0]
    if isinstance(first, SinkhornCentering):
        return sinkhorn_biases(logits, temperature, n_iterations=first.n_iterations, group=first.group)
    return [centering(x, temperature) for centering, x in zip(centerings, logits, strict=True)]


def make_centering(config: ObjectiveConfig, num_prototypes: int, group: dist.ProcessGroup | None) -> Centering:
    """The centring that the configuration names, for logits [B, num_prototypes]."""
    if config.centering == "softmax":
        return SoftmaxCentering(num_prototypes, config.center_momentum, group)
    return SinkhornCentering(config.sinkhorn_iterations, group)


@dataclass(frozen=True)
class Targets:
    """The teacher's targets softmax(logits / temperature + bias), for N student rows.

    Attributes:
        logits: [M, K] logits of the teacher.
        bias: [K] bias of the teacher's centring.
        temperature: temperature of the teacher.
        weight: [N] weight of each student row's loss.
        index: [N, J] int64, the J targets of each student row, whose losses are added; None means N = M, and row i has
            target i.
    """

    logits: Tensor
    bias: Tensor
    temperature: float
    weight: Tensor
    index: Tensor | None = None


def prototype_losses(
    students: tuple[Projected, Projected],
    targets: tuple[Targets, Targets],
    student_temperature: float,
    student_logits: StudentLogits,
) -> list[Tensor]:
    """Weighted losses [N] of the student's rows, for class tokens and for patches.

    The backward pass overwrites stored logits with their gradients, so it can run only once.
    """
    options: list[dict[str, Any]] = [
        {
            "student_temperature": student_temperature,
            "teacher_temperature": target.temperature,
            "teacher_bias": target.bias,
            "row_weight": target.weight,
            "teacher_index": target.index,
        }
        for target in targets
    ]
    if student_logits == "stored":
        return [
            soft_cross_entropy(logits, target.logits, overwrite_student_logits=True, **option)
            for logits, target, option in zip(logits_of(*students), targets, options, strict=True)
        ]
    return [
        student.prototypes.cross_entropy(student.features, target.logits, **option)
        for student, target, option in zip(students, targets, options, strict=True)
    ]
