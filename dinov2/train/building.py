"""What a run trains: the networks and the objective between them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dinov2.objectives import Distillation, SelfDistillation, build_network, build_networks
from dinov2.train.config import DistillConfig, RunConfig
from dinov2.train.frozen_teacher import read_frozen_teacher
from dinov2.train.initial_weights import load_centers


def build_objective(config: RunConfig, group: dist.ProcessGroup | None) -> SelfDistillation:
    """Students, teacher and objective of a run on the host, with weights drawn by PyTorch's generator.

    A frozen teacher, and the centres that it was trained with, are read from where the configuration says.

    Raises:
        FileNotFoundError, ValueError: the frozen teacher is not there, has no heads, or is another one than before.
    """
    if isinstance(config, DistillConfig):
        students = {
            name: build_network(vit, config.dino_head, config.ibot_head) for name, vit in config.students.items()
        }
        with torch.device("cpu"):  # also in processes that build their students without memory
            weights = read_frozen_teacher(config)
            teacher = weights.network()
        distillation = Distillation(students, teacher, config.objective, group)
        load_centers(distillation, weights, list(weights.heads))
        return distillation
    student, teacher = build_networks(config.networks["vit"], config.dino_head, config.ibot_head)
    return SelfDistillation(student, teacher, config.objective, group)
