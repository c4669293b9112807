"""Hand-made descriptors of small images, as baselines for learned features: pixels, colours and textures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.extras import require

TEXTURES = ((8, 1), (8, 2), (16, 2))  # local binary patterns: points on a circle, and its radius in pixels


def raw_pixels(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The pixels on a scale from 0 to 1: uint8 ``[N, H, W, 3]`` to float32 ``[N, 3 * H * W]``."""
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def colour_histogram(images: npt.NDArray[np.uint8], bins: int = 16) -> npt.NDArray[np.float32]:
    """Histograms of red, green and blue side by side; their sum is 1.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        bins: bins per channel, of equal width.

    Returns:
        float32 ``[N, 3 * bins]``.
    """
    levels = images.reshape(len(images), -1, 3).astype(np.int64) * bins // 256 + np.arange(3) * bins  # [N, H * W, 3]
    return _histograms(levels.reshape(len(images), -1), 3 * bins)


def texture_histogram(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Histograms of uniform local binary patterns (Ojala et al. 2002) of the grey image at three scales; sums are 1.

    Args:
        images: uint8 ``[N, H, W, 3]``.

    Returns:
        float32 ``[N, 38]``: 10, 10 and 18 bins for 8, 8 and 16 points at radius 1, 2 and 2.

    Raises:
        ImportError: scikit-image is missing (extra ``demo``).
    """
    feature = require("skimage.feature", extra="demo", purpose="texture_histogram")
    grey = np.rint(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)  # [N, H, W]
    histograms = []
    for points, radius in TEXTURES:
        patterns = [feature.local_binary_pattern(image, points, radius, "uniform") for image in grey]
        histograms.append(_histograms(np.stack(patterns).reshape(len(grey), -1).astype(np.int64), points + 2))
    return np.concatenate(histograms, axis=1) / np.float32(len(TEXTURES))


def descriptors(images: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.float32]]:
    """Every descriptor by its name: uint8 ``[N, H, W, 3]`` to float32 ``[N, D]``; each has a D of its own.

    The last one has colour, and texture with twice the weight. It is the best known for telling photographs apart.
    """
    colour, texture = colour_histogram(images), texture_histogram(images)
    return {
        "raw pixels": raw_pixels(images),
        "colour histogram": colour,
        "texture histogram (LBP)": texture,
        "colour and texture": np.concatenate([colour, 2 * texture], axis=1),
    }


def _histograms(values: npt.NDArray[np.int64], bins: int) -> npt.NDArray[np.float32]:
    """The share of each value 0 ... bins - 1 in each row: int64 ``[N, M]`` to float32 ``[N, bins]``."""
    rows = np.arange(len(values))[:, None] * bins
    counts = np.bincount((rows + values).ravel(), minlength=len(values) * bins)
    return counts.reshape(len(values), bins).astype(np.float32) / np.float32(values.shape[1])
