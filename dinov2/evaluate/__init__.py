"""Evaluation of frozen features."""

from __future__ import annotations

from dinov2.evaluate.knn import knn_accuracy
from dinov2.evaluate.probe import FolderProbe

__all__ = ["FolderProbe", "knn_accuracy"]
