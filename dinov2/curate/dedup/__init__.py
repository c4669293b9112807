"""The dedup stage keeps one image of each group of near-copies, and drops images that are near an evaluation image."""

from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.dedup.stage import dedup

__all__ = ["DedupConfig", "dedup"]
