"""Copies of images: features that find candidates, and a comparison of two images that decides."""

from dinov2.curate.copies.comparison import Comparison, compare, is_plain
from dinov2.curate.copies.points import Sketch, sketch

__all__ = ["Comparison", "Sketch", "compare", "is_plain", "sketch"]
