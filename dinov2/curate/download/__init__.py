"""Images from their links, politely and safely."""

from dinov2.curate.download.config import DownloadConfig
from dinov2.curate.download.stage import download

__all__ = ["DownloadConfig", "download"]
