"""The images of a pool that are like curated ones, or a balanced sample of it."""

from dinov2.curate.retrieve.config import RetrieveConfig
from dinov2.curate.retrieve.stage import retrieve

__all__ = ["RetrieveConfig", "retrieve"]
