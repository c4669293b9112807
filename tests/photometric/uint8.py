"""A plan carried out by the functions of dinov2.data.photometric, which round to whole levels after every step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.data import photometric
from dinov2.data.augmentation import normalize
from dinov2_kernels.photometric import ImagePlan, Jitter
from tests.photometric.cases import MEAN, STD

ADJUST = {
    Jitter.BRIGHTNESS: photometric.adjust_brightness,
    Jitter.CONTRAST: photometric.adjust_contrast,
    Jitter.SATURATION: photometric.adjust_saturation,
    Jitter.HUE: photometric.adjust_hue,
}


def recolour(image: npt.NDArray[np.uint8], plan: ImagePlan) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] to the same, all steps before the normalisation."""
    if plan.flip:
        image = photometric.flip(image)
    for jitter, strength in plan.jitters:
        image = ADJUST[jitter](image, strength)
    if plan.grayscale:
        image = photometric.grayscale(image)
    if plan.blur_sigma > 0:
        image = photometric.gaussian_blur(image, plan.blur_sigma, 9)
    if plan.solarize_threshold <= 255:
        image = photometric.solarize(image, int(plan.solarize_threshold))
    return image


def augment(image: npt.NDArray[np.uint8], plan: ImagePlan) -> npt.NDArray[np.float32]:
    """uint8 [H, W, 3] to float32 [3, H, W], normalised."""
    return normalize(recolour(image, plan), tuple(MEAN), tuple(STD))
