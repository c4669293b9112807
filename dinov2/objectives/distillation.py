"""Distillation of a large model into a smaller one (DINOv2, arXiv:2304.07193, section 5)."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.models import VisionTransformer
from dinov2.objectives.config import ObjectiveConfig
from dinov2.objectives.networks import check_networks
from dinov2.objectives.self_distillation import SelfDistillation


class Distillation(SelfDistillation):
    """A student that learns from a frozen teacher, by the losses of :class:`SelfDistillation` with these differences:

    - the teacher, with its heads, stands still; it may have another architecture, with as many prototypes;
    - nothing is hidden from the student, and iBOT compares all patches of the global crops;
    - a moving average of the student is what training is for.

    The centres of softmax centring move as ever. Give the student no stochastic depth.

    Args:
        student, teacher: modules named backbone, dino_head and, in both or neither, ibot_head.
        config, group: as for :class:`SelfDistillation`.

    Raises:
        ValueError: a module is missing, or the two networks differ in prototypes or in the size of a patch.
    """

    def __init__(
        self,
        student: nn.ModuleDict,
        teacher: nn.ModuleDict,
        config: ObjectiveConfig,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(student, teacher, config, group)
        self._average = copy.deepcopy(student).requires_grad_(False).eval()

    @property
    def average(self) -> nn.ModuleDict:
        """The moving average of the student."""
        return self._average

    def _check_networks(self, student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
        check_networks(student, teacher)
        expected, got = (
            cast(VisionTransformer, network["backbone"]).config.patch_size for network in (student, teacher)
        )
        if got != expected:
            raise ValueError(f"teacher: expected the student's patches of {expected} pixels, got {got}")

    def _predicted_and_hidden(self, masks: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.ones_like(masks), None
