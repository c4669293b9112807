"""Distillation of a large model into smaller ones (DINOv2, arXiv:2304.07193, section 5)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.models import VisionTransformer
from dinov2.objectives.config import ObjectiveConfig
from dinov2.objectives.networks import check_networks
from dinov2.objectives.self_distillation import SelfDistillation, Views


class Distillation(SelfDistillation):
    """Students that learn from a frozen teacher, by the losses of :class:`SelfDistillation` with these differences:

    - the teacher and its heads are frozen; it may have another architecture, but the same number of prototypes;
    - students see all patches, and iBOT compares all patches of the global crops;
    - training produces a moving average of each student;
    - the teacher runs once for all students.

    The centres of softmax centring still move. Give students no stochastic depth. Their mask tokens are unused and not
    trained.

    Args:
        students: students by name, each with the modules backbone and dino_head, and ibot_head if the teacher has it.
        teacher: modules of the same names.
        config: see :class:`SelfDistillation`.
        group: see :class:`SelfDistillation`.

    Raises:
        ValueError: a module is missing, or a student and the teacher differ in prototypes or patch size.
    """

    def __init__(
        self,
        students: Mapping[str, nn.ModuleDict],
        teacher: nn.ModuleDict,
        config: ObjectiveConfig,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(nn.ModuleDict(students), teacher, config, group)
        for student in students.values():
            cast(VisionTransformer, student["backbone"]).mask_token.requires_grad_(False)
        self._average = copy.deepcopy(self.student).requires_grad_(False).eval()

    @property
    def average(self) -> nn.ModuleDict:
        """The moving averages of the students by name."""
        return self._average

    @property
    def students(self) -> dict[str, nn.ModuleDict]:
        """The students by name."""
        return cast("dict[str, nn.ModuleDict]", dict(self.student.items()))

    @property
    def averages(self) -> dict[str, nn.ModuleDict]:
        """The students' moving averages by name."""
        return cast("dict[str, nn.ModuleDict]", dict(self._average.items()))

    def label(self, student: str, value: str) -> str:
        """The name of a student's value among the values of all students: ``student/value``."""
        return f"{student}/{value}"

    @property
    def networks(self) -> list[nn.ModuleDict]:
        """All networks of the objective."""
        return [*self.students.values(), self.teacher, *self.averages.values()]

    def forward(self, batch: Mapping[str, Tensor] | Views, teacher_temperature: float) -> dict[str, Tensor]:
        """Losses of one batch. Arguments and errors are those of :meth:`SelfDistillation.forward`.

        Returns:
            The scalars of each student, such as ``small/dino_local`` of the student "small", and total, the sum of the
            students' totals.
        """
        views = self.views(batch)
        targets = self._targets(views, teacher_temperature)
        losses = {
            f"{name}/{term}": value
            for name, student in self.students.items()
            for term, value in self._losses(student, views, targets).items()
        }
        return losses | {"total": torch.stack([losses[f"{name}/total"] for name in self.students]).sum()}

    def _check_networks(self, student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
        expected = cast(VisionTransformer, teacher["backbone"]).config.patch_size if "backbone" in teacher else None
        for name, network in student.items():
            try:
                check_networks(cast(nn.ModuleDict, network), teacher)
            except ValueError as error:
                raise ValueError(f"student {name}: {error}") from error
            got = cast(VisionTransformer, cast(nn.ModuleDict, network)["backbone"]).config.patch_size
            if got != expected:
                raise ValueError(f"student {name}: expected the teacher's patches of {expected} pixels, got {got}")

    def _predicted_and_hidden(self, masks: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.ones_like(masks), None
