"""Features beside every image: of a model, or built in."""

from dinov2.curate.embed.config import EmbedConfig
from dinov2.curate.embed.stage import embed

__all__ = ["EmbedConfig", "embed"]
