"""The small run of the training tests."""

from __future__ import annotations

from tests.train.conftest import config

__all__ = ["config"]
