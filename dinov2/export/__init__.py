"""Weights of a run, written as files that anyone can read."""

from __future__ import annotations

from dinov2.export.weights import export

__all__ = ["export"]
