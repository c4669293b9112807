"""A peer: the photometric augmentation of one image by OpenCV. ``recolour`` applies a plan.

Each step takes uint8 RGB ``[H, W, 3]`` and returns the same. It equals Pillow's operation of the same name within
rounding; the blur equals torchvision's. Vectorised lookup tables, colour conversions and filters take a fifth of
Pillow's time.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from dinov2_kernels.photometric import ImagePlan, Jitter
from dinov2_kernels.photometric.reference import BLUR_TAPS

RGBImage = npt.NDArray[np.uint8]  # [H, W, 3]

_LEVELS = np.arange(256, dtype=np.float32)


def recolour(image: RGBImage, plan: ImagePlan) -> RGBImage:
    """Apply all steps of a plan; each rounds to whole levels."""
    if plan.flip:
        image = cv2.flip(image, 1)
    for jitter, strength in plan.jitters:
        image = JITTERS[jitter](image, strength)
    if plan.grayscale:
        image = grayscale(image)
    if plan.blur_sigma > 0:
        image = gaussian_blur(image, plan.blur_sigma, BLUR_TAPS)
    if math.isfinite(plan.solarize_threshold):
        image = solarize(image, plan.solarize_threshold)
    return image


def _map_levels(image: RGBImage, levels: npt.NDArray[np.float32]) -> RGBImage:
    """Replace level ``i`` by ``levels[i]``, clipped to 0...255; rounds down, as Pillow does."""
    mapped: RGBImage = cv2.LUT(image, np.minimum(np.maximum(levels, 0), 255).astype(np.uint8))
    return mapped


def _gray(image: RGBImage) -> npt.NDArray[np.uint8]:
    """Luma (ITU-R 601), ``[H, W]``."""
    gray: npt.NDArray[np.uint8] = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return gray


def grayscale(image: RGBImage) -> RGBImage:
    """Luma in all three channels."""
    gray: RGBImage = cv2.cvtColor(_gray(image), cv2.COLOR_GRAY2RGB)
    return gray


def adjust_brightness(image: RGBImage, factor: float) -> RGBImage:
    """Multiply all levels by ``factor``."""
    return _map_levels(image, factor * _LEVELS)


def adjust_contrast(image: RGBImage, factor: float) -> RGBImage:
    """Move all levels away from the image's mean luma, by ``factor``."""
    mean = int(cv2.mean(_gray(image))[0] + 0.5)
    return _map_levels(image, mean + factor * (_LEVELS - mean))


def adjust_saturation(image: RGBImage, factor: float) -> RGBImage:
    """Move all pixels away from their own luma, by ``factor``."""
    adjusted: RGBImage = cv2.addWeighted(image, factor, grayscale(image), 1 - factor, 0)
    return adjusted


def adjust_hue(image: RGBImage, turn: float) -> RGBImage:
    """Turn the hue by ``turn`` full circles, at constant saturation and value (HSV)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue: 256 steps a circle
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # wraps around
    turned: RGBImage = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return turned


def solarize(image: RGBImage, threshold: float) -> RGBImage:
    """Invert the levels from ``threshold`` on."""
    return _map_levels(image, np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS))


def gaussian_blur(image: RGBImage, sigma: float, kernel_size: int) -> RGBImage:
    """Convolve with a Gaussian of ``sigma`` pixels cut to ``kernel_size``, borders reflected."""
    kernel = cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F)
    blurred: RGBImage = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return blurred


JITTERS = {
    Jitter.BRIGHTNESS: adjust_brightness,
    Jitter.CONTRAST: adjust_contrast,
    Jitter.SATURATION: adjust_saturation,
    Jitter.HUE: adjust_hue,
}
