"""Pretraining: configuration, schedules, the loop, checkpoints and metrics."""

from __future__ import annotations

from dinov2.train.config import OptimConfig, PretrainConfig, TeacherConfig
from dinov2.train.interruption import Interrupted
from dinov2.train.loop import pretrain
from dinov2.train.metrics import NonFiniteError, read_metrics
from dinov2.train.trainer import Probe

__all__ = [
    "Interrupted",
    "NonFiniteError",
    "OptimConfig",
    "PretrainConfig",
    "Probe",
    "TeacherConfig",
    "pretrain",
    "read_metrics",
]
