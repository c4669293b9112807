"""How far the definition, which never rounds, is from dinov2.data.photometric, which rounds after every step.

Bounds are in levels of 0 to 255. One step from the same whole levels: rounding down costs up to 1, to the nearest 1/2;
contrast also rounds its mean, grayscale and saturation their luma; and 8-bit HSV knows 256 hues and saturations only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dinov2.data import BundledPhotographs
from dinov2_kernels import PhotometricDistribution, draw_plan
from dinov2_kernels.photometric import ImagePlan, Jitter, reference
from tests.photometric import uint8


@pytest.fixture(scope="module")
def images() -> list[npt.NDArray[np.uint8]]:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return [noise, *(photograph[100:250, 100:290] for photograph in BundledPhotographs(colour_only=True))]


def differences(images: list[npt.NDArray[np.uint8]], plan: ImagePlan) -> list[npt.NDArray[np.float32]]:
    """Of each image, in levels [H, W, 3]."""
    found = []
    for image in images:
        exact = reference.recolour(torch.from_numpy(image.copy()).permute(2, 0, 1).float(), plan)
        found.append(np.abs(uint8.recolour(image, plan) - exact.permute(1, 2, 0).numpy()))
    return found


@pytest.mark.parametrize(
    ("plan", "largest"),
    [
        (ImagePlan(flip=True), 0.0),
        (ImagePlan(jitters=((Jitter.BRIGHTNESS, 0.63),)), 1.0),
        (ImagePlan(jitters=((Jitter.BRIGHTNESS, 1.38),)), 1.0),
        (ImagePlan(jitters=((Jitter.CONTRAST, 0.61),)), 1 + 0.39),  # the mean moves by up to 1, of rounding twice
        (ImagePlan(jitters=((Jitter.CONTRAST, 1.37),)), 1 + 0.37),
        (ImagePlan(jitters=((Jitter.SATURATION, 0.81),)), 0.5 + 0.19 / 2),
        (ImagePlan(jitters=((Jitter.SATURATION, 1.2),)), 0.5 + 0.2 / 2),
        (ImagePlan(jitters=((Jitter.HUE, 13 / 256),)), 10.0),
        (ImagePlan(jitters=((Jitter.HUE, -25.5 / 256),)), 13.0),  # half a hue between two that 8 bits know
        (ImagePlan(grayscale=True), 0.5),
        (ImagePlan(blur_sigma=0.3), 0.5),
        (ImagePlan(blur_sigma=1.9), 0.5),
        (ImagePlan(solarize_threshold=128), 0.0),
    ],
    ids=str,
)
def test_one_step(images: list[npt.NDArray[np.uint8]], plan: ImagePlan, largest: float) -> None:
    found = differences(images, plan)
    assert max(difference.max() for difference in found) <= largest + 0.01  # OpenCV's fixed-point weights


def test_whole_plans(images: list[npt.NDArray[np.uint8]]) -> None:
    """Rounding down lets the uint8 pipeline lose half a level a step; the mean of all that stays below 2.5 levels."""
    distribution = PhotometricDistribution(solarize=0.3)
    plans = draw_plan(distribution, [np.random.default_rng((1, n)) for n in range(60)]).images()
    means = [differences([images[n % len(images)]], plan)[0].mean() for n, plan in enumerate(plans)]
    assert np.mean(means) < 1.2
    assert max(means) < 2.5
