"""Pretraining: configuration, schedules, the loop, checkpoints and metrics."""

from __future__ import annotations

from dinov2.train.config import DistillConfig, OptimConfig, ParallelConfig, PretrainConfig, RunConfig, TeacherConfig
from dinov2.train.loop import pretrain
from dinov2.train.metrics import NonFiniteError, read_metrics
from dinov2.train.processes import Interrupted, PeerError
from dinov2.train.saving import CheckpointError
from dinov2.train.trainer import Probe

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
