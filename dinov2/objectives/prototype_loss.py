"""Cross-entropy over the prototypes, of students that are projected tokens and targets that are never written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dinov2.objectives.config import StudentLogits
from dinov2.objectives.networks import Projected, logits_of
from dinov2_kernels import soft_cross_entropy


@dataclass(frozen=True)
class Targets:
    """The teacher's targets softmax(logits / temperature + bias), and which students face them.

    Attributes:
        logits: [M, K] of the teacher.
        bias: [K] of its centring.
        temperature: of the teacher.
        weight: [N] weight of each student's loss.
        index: [N, J] int64, the targets of each student, whose losses are added; None: N = M, each its own.
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
    """Weighted loss [N] of each student, for class tokens and for patches.

    Stored logits are overwritten by their gradients in the backward pass, which can therefore run only once.
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
