"""The frozen teacher of a distillation: where it is read, and how a resumed run knows that it is the same one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from dinov2.models import Weights
from dinov2.train.config import DistillConfig
from dinov2.train.networks import read_networks


def read_teacher(path: Path) -> Weights:
    """A network that can teach: a backbone with the heads that it was trained with.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it cannot be read, or has no heads.
    """
    teacher = read_networks(path).teacher
    if "dino_head" not in teacher.heads:
        raise ValueError(
            f"{path} has no heads, so it cannot teach: students learn what a teacher's heads say of an image."
            " A run, its checkpoints, an export with heads (dinov2 export --heads) and facebook's"
            " teacher_checkpoint.pth have them; published weights do not"
        )
    return teacher


def read_frozen_teacher(config: DistillConfig) -> Weights:
    """The teacher that a distillation was configured with.

    Raises:
        FileNotFoundError: it is not there any more.
        ValueError: there are other weights now.
    """
    teacher = read_teacher(config.frozen_teacher)
    found = digest(teacher)
    if found != config.frozen_teacher_sha256:
        raise ValueError(
            f"frozen_teacher {config.frozen_teacher} is not the teacher of this run: the digest of its weights is"
            f" {found[:16]}..., but must be {config.frozen_teacher_sha256[:16] or 'given'}..."
        )
    return teacher


def digest(weights: Weights) -> str:
    """SHA-256 of names, types, shapes and numbers of backbone and heads, in whatever file they are."""
    result = hashlib.sha256()
    for name, tensor in sorted(weights.named_tensors().items()):
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        result.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()
