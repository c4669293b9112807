"""Near-copies: one of each group stays in a pool, and none that is near an evaluation image."""

from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.dedup.stage import dedup

__all__ = ["DedupConfig", "dedup"]
