"""Settings of the screen stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScreenConfig:
    """What is unfit for training. Every measure is written; a changed threshold measures nothing again."""

    min_side: int = 64
    """Pixels of the shorter side at least."""
    max_aspect: float = 4.0
    """Longer side over shorter side at most."""
    min_entropy: float = 3.0
    """Of the histogram of grey levels, in bits of 8: flat colours, blank pages and plain logos have less."""
    min_sharpness: float = 0.0
    """Variance of the Laplacian of the grey image at 256 pixels, below about 20 where it is blurred. 0 keeps all."""
    max_distance: int = 2
    """Bits of 64 in which the PCA hashes of near-duplicates differ at most; -1 looks for none."""
    hash_sample: int = 5000
    """Images of the pool that the directions of the PCA hash are fitted to."""
    nsfw: str = ""
    """Scorer of nudity and violence: MODULE:FUNCTION, called with a list of uint8 RGB images [H, W, 3] and giving
    numbers of 0 to 1, or an ONNX file that maps float32 [b, 3, 224, 224] of 0 to 1 to [b] or [b, 1]. None by default:
    no such model may be bundled."""
    nsfw_threshold: float = 0.5
    """Score from which on an image is dropped."""
    faces: str = "bundled"
    """Detector of faces, to be blurred in the final set: bundled, none, or MODULE:FUNCTION, called with a list of uint8
    RGB images and giving for each a list of boxes (x, y, width, height) in pixels."""
    seed: int = 0
    """Of the hash's sample."""

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"screen.min_side must be positive, but is {self.min_side}")
        if self.max_aspect < 1:
            raise ValueError(f"screen.max_aspect must be 1 or more, but is {self.max_aspect}")
        if not -1 <= self.max_distance <= 8:
            raise ValueError(f"screen.max_distance must be from -1 to 8, but is {self.max_distance}")
        if not 0 <= self.nsfw_threshold <= 1:
            raise ValueError(f"screen.nsfw_threshold must be from 0 to 1, but is {self.nsfw_threshold}")
        if self.hash_sample < 1:
            raise ValueError(f"screen.hash_sample must be positive, but is {self.hash_sample}")
