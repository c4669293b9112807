"""What a run trains: the networks and the objective between them."""

from __future__ import annotations

import torch.distributed as dist

from dinov2.objectives import SelfDistillation, build_networks
from dinov2.train.config import PretrainConfig


def build_objective(config: PretrainConfig, group: dist.ProcessGroup | None) -> SelfDistillation:
    """Student, teacher and objective of a run on the host, with weights drawn by PyTorch's generator."""
    student, teacher = build_networks(config.vit, config.dino_head, config.ibot_head)
    return SelfDistillation(student, teacher, config.objective, group)
