"""What is unfit for training goes, by looking at each image once; faces are found."""

from dinov2.curate.screen.config import ScreenConfig
from dinov2.curate.screen.stage import screen

__all__ = ["ScreenConfig", "screen"]
