"""Pretraining: configuration, schedules, the loop, checkpoints and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2.lazily import names_from
from dinov2.train.config import DistillConfig, OptimConfig, ParallelConfig, PretrainConfig, RunConfig, TeacherConfig

if TYPE_CHECKING:
    from dinov2.train.loop import pretrain
    from dinov2.train.metrics import NonFiniteError, read_metrics
    from dinov2.train.processes import Interrupted, PeerError
    from dinov2.train.saving import CheckpointError
    from dinov2.train.trainer import Probe
else:
    __getattr__ = names_from(
        __name__,
        {
            "loop": ("pretrain",),
            "metrics": ("NonFiniteError", "read_metrics"),
            "processes": ("Interrupted", "PeerError"),
            "saving": ("CheckpointError",),
            "trainer": ("Probe",),
        },
    )

__all__ = [
    "CheckpointError",
    "DistillConfig",
    "Interrupted",
    "NonFiniteError",
    "OptimConfig",
    "ParallelConfig",
    "PeerError",
    "PretrainConfig",
    "Probe",
    "RunConfig",
    "TeacherConfig",
    "pretrain",
    "read_metrics",
]
