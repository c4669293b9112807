"""Links to images, out of web pages and crawls."""

from dinov2.curate.extract.config import ExtractConfig
from dinov2.curate.extract.stage import extract

__all__ = ["ExtractConfig", "extract"]
