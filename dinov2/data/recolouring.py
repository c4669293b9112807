"""What follows the crop, carried out on the host: an image's plan, step by step, then the normalisation.

``dinov2_kernels.photometric`` does the same to a whole batch on any device, without rounding between the steps.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from dinov2.data import multichannel, photometric
from dinov2.data.decoding import LEVELS, Pixels
from dinov2_kernels.photometric import ImagePlan, Jitter

JITTERS = {
    Jitter.BRIGHTNESS: "adjust_brightness",
    Jitter.CONTRAST: "adjust_contrast",
    Jitter.SATURATION: "adjust_saturation",
    Jitter.HUE: "adjust_hue",
}
"""Functions of :mod:`dinov2.data.photometric`, and the first two also of :mod:`dinov2.data.multichannel`."""


def recolour(image: Pixels, plan: ImagePlan, blur_kernel: int) -> Pixels:
    """Flip, jitter, make grey, blur and solarise an image as its plan says; each step rounds to whole levels.

    Args:
        image: uint8 RGB ``[H, W, 3]``, or uint8, uint16 or float32 ``[H, W, C]`` with another number of channels.
        plan: what is to be done; saturation, hue and grey are for RGB alone.
        blur_kernel: side of the blur's kernel, odd, in pixels.

    Returns:
        An image of the same shape and type; it may be ``image`` itself.
    """
    operations = photometric if image.shape[2] == 3 else multichannel
    if plan.flip:
        image = operations.flip(image)
    for jitter, strength in plan.jitters:
        image = getattr(operations, JITTERS[jitter])(image, strength)
    if plan.grayscale:
        image = photometric.grayscale(image)
    if plan.blur_sigma > 0:
        image = operations.gaussian_blur(image, plan.blur_sigma, blur_kernel)
    if math.isfinite(plan.solarize_threshold):
        image = operations.solarize(image, plan.solarize_threshold)
    return image


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
    """Float32 ``[C, 1, 1]`` each, such that ``level * scale + shift`` is the normalised value."""
    channels = np.array([mean, std])[:, :, None, None]  # [2, C, 1, 1]
    return (1 / (full_level * channels[1])).astype(np.float32), (-channels[0] / channels[1]).astype(np.float32)
