"""Brightness, contrast, blur and solarisation of images that are not RGB: ``[H, W, C]`` in, the same out.

What :mod:`dinov2.data.photometric` does to 8-bit RGB, for any number of channels and every type in
:data:`~dinov2.data.decoding.LEVELS`. Whole-number levels are rounded down and kept in their range; of float32, 1 is the
full level, but nothing is kept from going beyond, nor below 0. Hue, saturation and grey are missing: they are defined
by how the eye sees red, green and blue.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import LEVELS, Pixels
from dinov2_kernels._extras import require

FILTERED_AT_ONCE = 64  # channels; OpenCV's filters take 128


def _as_levels(values: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> Pixels:
    """Values as pixels of a type."""
    if dtype == np.float32:
        return values
    return np.clip(values, 0, LEVELS[dtype], out=values).astype(dtype)


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Multiply all levels by ``factor``."""
    return _as_levels(np.float32(factor) * image, image.dtype)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Move the levels of each channel away from its own mean, by ``factor``."""
    mean = image.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)  # [C]
    if image.dtype != np.float32:
        mean = np.floor(mean + np.float32(0.5))
    return _as_levels(mean + np.float32(factor) * (image - mean), image.dtype)


def solarize(image: Pixels, threshold: float) -> Pixels:
    """Invert the levels from ``threshold`` of 255 on, or what corresponds to it in another type."""
    full = LEVELS[image.dtype]
    level = image.dtype.type
    inverted: Pixels = np.where(image >= level(threshold * full / 255), level(full) - image, image)
    return inverted


def gaussian_blur(image: Pixels, sigma: float, kernel_size: int) -> Pixels:
    """Convolve with a Gaussian of ``sigma`` pixels cut to ``kernel_size``, borders reflected."""
    cv2 = require("cv2", extra="train", purpose="blur")
    kernel = cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F)
    blurred = np.empty_like(image)
    for first in range(0, image.shape[2], FILTERED_AT_ONCE):
        part = np.ascontiguousarray(image[..., first : first + FILTERED_AT_ONCE])
        filtered = cv2.sepFilter2D(part, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
        blurred[..., first : first + FILTERED_AT_ONCE] = filtered.reshape(part.shape)  # OpenCV drops a single channel
    return blurred


def flip(image: Pixels) -> Pixels:
    """Mirror left and right."""
    return np.ascontiguousarray(image[:, ::-1])
