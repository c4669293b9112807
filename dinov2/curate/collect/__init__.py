"""A pool from images that are there already: files in folders, or tar shards."""

from dinov2.curate.collect.config import CollectConfig
from dinov2.curate.collect.stage import collect

__all__ = ["CollectConfig", "collect"]
