"""What the augmentation is compared with: each of its operations by Pillow, the blur by NumPy, and whole plans.

Every step rounds to whole levels: brightness, contrast and saturation down, as Pillow's blend does, the others to the
nearest.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from dinov2_kernels.photometric import ImagePlan, Jitter
from dinov2_kernels.photometric.reference import BLUR_TAPS

RGBImage = npt.NDArray[np.uint8]  # [H, W, 3]


def recolour(image: RGBImage, plan: ImagePlan) -> RGBImage:
    """All steps of a plan."""
    if plan.flip:
        image = flip(image)
    for jitter, strength in plan.jitters:
        image = JITTERS[jitter](image, strength)
    if plan.grayscale:
        image = grayscale(image)
    if plan.blur_sigma > 0:
        image = gaussian_blur(image, plan.blur_sigma, BLUR_TAPS)
    if math.isfinite(plan.solarize_threshold):
        image = solarize(image, int(plan.solarize_threshold))
    return image


def grayscale(image: RGBImage) -> RGBImage:
    return np.asarray(ImageOps.grayscale(Image.fromarray(image)).convert("RGB"))


def adjust_brightness(image: RGBImage, factor: float) -> RGBImage:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


def adjust_contrast(image: RGBImage, factor: float) -> RGBImage:
    return np.asarray(ImageEnhance.Contrast(Image.fromarray(image)).enhance(factor))


def adjust_saturation(image: RGBImage, factor: float) -> RGBImage:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def adjust_hue(image: RGBImage, turn: float) -> RGBImage:
    hsv = np.array(Image.fromarray(image).convert("HSV"))  # hue: 256 steps a circle
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return np.asarray(Image.frombytes("HSV", hsv.shape[1::-1], hsv.tobytes()).convert("RGB"))


def solarize(image: RGBImage, threshold: int) -> RGBImage:
    return np.asarray(ImageOps.solarize(Image.fromarray(image), threshold))


def gaussian_blur(image: RGBImage, sigma: float, kernel_size: int) -> RGBImage:
    radius = kernel_size // 2
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    height, width, _ = image.shape
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    rows = np.sum([weight * padded[:, i : i + width] for i, weight in enumerate(kernel)], axis=0)
    blurred = np.sum([weight * rows[i : i + height] for i, weight in enumerate(kernel)], axis=0)  # [H, W, 3]
    rounded: RGBImage = np.rint(blurred).astype(np.uint8)
    return rounded


def flip(image: RGBImage) -> RGBImage:
    return np.asarray(ImageOps.mirror(Image.fromarray(image)))


def resized_crop(image: RGBImage, box: tuple[int, int, int, int], size: int) -> RGBImage:
    return np.asarray(Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BICUBIC))


JITTERS = {
    Jitter.BRIGHTNESS: adjust_brightness,
    Jitter.CONTRAST: adjust_contrast,
    Jitter.SATURATION: adjust_saturation,
    Jitter.HUE: adjust_hue,
}
