"""Finishing crops that are not RGB, in NumPy: brightness, contrast, blur, solarisation, normalisation.

:func:`dinov2_kernels.photometric` finishes 8-bit RGB. This module takes any number of channels and every dtype in
:data:`~dinov2.data.decoding.LEVELS`. Each step takes an image ``[H, W, C]`` and returns one. Integer levels are clipped
to their range after each step, and rounded down (by the blur: to the nearest). Float32 levels are neither rounded nor
clipped: 1 is the full level, but levels may be above 1 or below 0. Hue, saturation and grey are missing, because they
are defined by how the eye sees red, green and blue.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import LEVELS, Pixels
from dinov2_kernels.photometric import ImagePlan, Jitter


def finish(
    image: Pixels, plan: ImagePlan, blur_kernel: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> npt.NDArray[np.float32]:
    """Carry out the plan of a crop and normalise it.

    Args:
        image: uint8, uint16 or float32 ``[H, W, C]``.
        plan: the plan of the crop, without saturation, hue and grey.
        blur_kernel: odd side of the blur's kernel in pixels.
        mean: mean of each channel, see :func:`normalize`.
        std: standard deviation of each channel, see :func:`normalize`.

    Returns:
        Float32 ``[C, H, W]``.
    """
    if plan.flip:
        image = flip(image)
    for jitter, strength in plan.jitters:
        image = JITTERS[jitter](image, strength)
    if plan.blur_sigma > 0:
        image = gaussian_blur(image, plan.blur_sigma, blur_kernel)
    if math.isfinite(plan.solarize_threshold):
        image = solarize(image, plan.solarize_threshold)
    return normalize(image, mean, std)


def normalize(image: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """``(image / full level - mean) / std``, channels first: uint8, uint16 or float32 ``[H, W, C]`` to float32
    ``[C, H, W]``; the full level is 255, 65535 or 1."""
    scale, shift = _scale_and_shift(mean, std, LEVELS[image.dtype])
    normalized = np.empty((image.shape[2], *image.shape[:2]), dtype=np.float32)
    np.multiply(image.transpose(2, 0, 1), scale, out=normalized)
    normalized += shift
    return normalized


@functools.cache
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], full_level: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scale and shift, float32 ``[C, 1, 1]`` each: the normalised value is ``level * scale + shift``."""
    channels = np.array([mean, std])[:, :, None, None]  # [2, C, 1, 1]
    return (1 / (full_level * channels[1])).astype(np.float32), (-channels[0] / channels[1]).astype(np.float32)


def _as_levels(values: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> Pixels:
    """Values as pixels of a dtype."""
    if dtype == np.float32:
        return values
    return np.clip(values, 0, LEVELS[dtype], out=values).astype(dtype)


def adjust_brightness(image: Pixels, factor: float) -> Pixels:
    """Multiply all levels by ``factor``."""
    return _as_levels(np.float32(factor) * image, image.dtype)


def adjust_contrast(image: Pixels, factor: float) -> Pixels:
    """Multiply the distance of all levels from their channel's mean by ``factor``."""
    mean = image.mean(axis=0, dtype=np.float64).mean(axis=0).astype(np.float32)  # [C]; faster than both axes at once
    if image.dtype != np.float32:
        mean = np.floor(mean + np.float32(0.5))
    mean = np.tile(mean, (image.shape[1], 1))  # [W, C], because NumPy broadcasts short rows slowly
    return _as_levels(mean + np.float32(factor) * (image - mean), image.dtype)


def solarize(image: Pixels, threshold: float) -> Pixels:
    """Invert the levels from ``threshold`` on; it counts from 0 to 255 and is scaled for other dtypes."""
    full = LEVELS[image.dtype]
    level = image.dtype.type
    inverted: Pixels = np.where(image >= level(threshold * full / 255), level(full) - image, image)
    return inverted


def gaussian_blur(image: Pixels, sigma: float, kernel_size: int) -> Pixels:
    """Convolve with a Gaussian of ``sigma`` pixels, cut to ``kernel_size``. Borders are reflected."""
    reach, (height, width, _) = kernel_size // 2, image.shape
    weight = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)  # from the middle outwards
    weight = (weight / (weight[0] + 2 * weight[1:].sum())).astype(np.float32)
    margins = ((reach, reach), (reach, reach), (0, 0))
    padded = np.pad(image, margins, mode="reflect").astype(np.float32)
    along_columns = _weighted(lambda k: padded[reach + k : reach + k + height], weight)
    blurred = _weighted(lambda k: along_columns[:, reach + k : reach + k + width], weight)
    return blurred if image.dtype == np.float32 else np.rint(blurred).astype(image.dtype)


def _weighted(
    shifted: Callable[[int], npt.NDArray[np.float32]], weight: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The weighted sum of ``shifted(k)`` for a symmetric kernel; k goes from minus to plus its reach."""
    total: npt.NDArray[np.float32] = weight[0] * shifted(0)
    pair = np.empty_like(total)
    for k in range(1, len(weight)):
        np.add(shifted(-k), shifted(k), out=pair)
        pair *= weight[k]
        total += pair
    return total


def flip(image: Pixels) -> Pixels:
    """Mirror left and right."""
    return np.ascontiguousarray(image[:, ::-1])


JITTERS = {Jitter.BRIGHTNESS: adjust_brightness, Jitter.CONTRAST: adjust_contrast}
