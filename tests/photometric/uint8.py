"""A plan carried out by dinov2.data.recolouring, which rounds to whole levels after every step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.data import normalize
from dinov2.data.recolouring import recolour as recolour_image
from dinov2_kernels.photometric import ImagePlan
from dinov2_kernels.photometric.reference import BLUR_TAPS
from tests.photometric.cases import MEAN, STD


def recolour(image: npt.NDArray[np.uint8], plan: ImagePlan) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, 3] to the same, all steps before the normalisation."""
    return recolour_image(image, plan, BLUR_TAPS)


def augment(image: npt.NDArray[np.uint8], plan: ImagePlan) -> npt.NDArray[np.float32]:
    """uint8 [H, W, 3] to float32 [3, H, W], normalised."""
    return normalize(recolour(image, plan), tuple(MEAN), tuple(STD))
