"""How far the operator and its definition, which never round, are from Pillow, which rounds after every step.

Bounds are in levels of 0 to 255. One step from the same whole levels: rounding down costs up to 1, to the nearest 1/2;
contrast also rounds its mean, grayscale and saturation their luma; and 8-bit HSV knows 256 hues and saturations only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from skimage import color

from dinov2.data import BundledPhotographs
from dinov2_kernels import PhotometricDistribution, PhotometricPlan, draw_plan, photometric
from dinov2_kernels.photometric import ImagePlan, Jitter, reference
from tests.photometric import pillow

Levels = npt.NDArray[np.float32]  # [H, W, 3]


@pytest.fixture(scope="module")
def images() -> list[npt.NDArray[np.uint8]]:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (9, 1, 3))
    return [noise, ramp, *(photograph[100:250, 100:290] for photograph in BundledPhotographs(colour_only=True))]


def by_operator(image: npt.NDArray[np.uint8], plan: ImagePlan) -> Levels:
    """Levels, never rounded."""
    table = PhotometricPlan.of([plan])
    before = image.copy()
    found = photometric(torch.from_numpy(image.copy())[None], table, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    np.testing.assert_array_equal(image, before)
    return found[0].permute(1, 2, 0).numpy()


def by_definition(image: npt.NDArray[np.uint8], plan: ImagePlan) -> Levels:
    levels = torch.from_numpy(image.copy()).permute(2, 0, 1).float()
    return reference.recolour(levels, plan).permute(1, 2, 0).numpy()


def differences(images: list[npt.NDArray[np.uint8]], plan: ImagePlan) -> list[Levels]:
    """Differences of each image between the definition and Pillow."""
    return [np.abs(pillow.recolour(image, plan) - by_definition(image, plan)) for image in images]


def of_one(jitter: Jitter, strength: float) -> ImagePlan:
    return ImagePlan(jitters=((jitter, strength),))


@pytest.mark.parametrize(
    ("plan", "largest"),
    [
        (ImagePlan(flip=True), 0.0),
        (of_one(Jitter.BRIGHTNESS, 0.63), 1.0),
        (of_one(Jitter.BRIGHTNESS, 1.38), 1.0),
        (of_one(Jitter.CONTRAST, 0.61), 1 + 0.39),  # the mean moves by up to 1, of rounding twice
        (of_one(Jitter.CONTRAST, 1.37), 1 + 0.37),
        (of_one(Jitter.SATURATION, 0.81), 1 + 0.19 / 2),
        (of_one(Jitter.SATURATION, 1.2), 1 + 0.2 / 2),
        (of_one(Jitter.HUE, 13 / 256), 11.0),  # Pillow rounds hue and saturation down
        (of_one(Jitter.HUE, -25.5 / 256), 13.0),  # half a hue between two that 8 bits know
        (ImagePlan(grayscale=True), 0.5),
        (ImagePlan(blur_sigma=0.3), 0.5),
        (ImagePlan(blur_sigma=1.9), 0.5),
        (ImagePlan(solarize_threshold=128), 0.0),
    ],
    ids=str,
)
def test_one_step(images: list[npt.NDArray[np.uint8]], plan: ImagePlan, largest: float) -> None:
    found = differences(images, plan)
    assert max(difference.max() for difference in found) <= largest + 0.01


def test_whole_plans(images: list[npt.NDArray[np.uint8]]) -> None:
    distribution = PhotometricDistribution(solarize=0.3)
    plans = draw_plan(distribution, [np.random.default_rng((1, n)) for n in range(60)]).images()
    means = [differences([images[n % len(images)]], plan)[0].mean() for n, plan in enumerate(plans)]
    assert np.mean(means) < 1.2
    assert max(means) < 2.5


# --- the operator: what it returns, rounded as Pillow rounds


def rounded(images: list[npt.NDArray[np.uint8]], plan: ImagePlan, *, down: bool = False) -> list[Levels]:
    """Differences between the operator, rounded to whole levels, and Pillow."""
    rounding = np.floor if down else np.rint
    return [np.abs(rounding(by_operator(image, plan)) - pillow.recolour(image, plan)) for image in images]


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.97, 1.0, 1.4, 2.0])
def test_brightness_is_pillows(images: list[npt.NDArray[np.uint8]], factor: float) -> None:
    assert max(d.max() for d in rounded(images, of_one(Jitter.BRIGHTNESS, factor), down=True)) == 0


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.97, 1.0, 1.4, 2.0])
def test_contrast_is_pillows_but_for_its_mean(images: list[npt.NDArray[np.uint8]], factor: float) -> None:
    """Pillow rounds the mean, and the luma whose mean it is."""
    for image in images:
        found = by_operator(image, of_one(Jitter.CONTRAST, factor))
        difference = found - pillow.adjust_contrast(image, factor)
        assert -abs(1 - factor) - 0.01 <= difference.min() <= difference.max() <= 1 + abs(1 - factor) + 0.01


@pytest.mark.parametrize("factor", [0.0, 0.8, 1.0, 1.2])
def test_saturation_is_pillows_but_for_rounding(images: list[npt.NDArray[np.uint8]], factor: float) -> None:
    assert max(d.max() for d in rounded(images, of_one(Jitter.SATURATION, factor), down=True)) <= 1


def test_grayscale_is_pillows_but_for_rounding(images: list[npt.NDArray[np.uint8]]) -> None:
    found = rounded(images, ImagePlan(grayscale=True))
    assert max(d.max() for d in found) <= 1
    assert max(d.mean() for d in found) < 0.01


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1])
def test_hue_is_pillows_within_its_own_error(images: list[npt.NDArray[np.uint8]], turn: float) -> None:
    """8-bit HSV rounds coarsely; both are compared with HSV in double precision, turned by the same angle."""
    turn = round(turn * 256) / 256
    ours_off, pillows_off, apart = [], [], []
    for image in images:
        hsv = color.rgb2hsv(image)
        hsv[..., 0] = (hsv[..., 0] + turn) % 1
        exact = 255 * color.hsv2rgb(hsv)
        ours, pillows = by_operator(image, of_one(Jitter.HUE, turn)), pillow.adjust_hue(image, turn)
        ours_off.append(np.abs(ours - exact))
        pillows_off.append(np.abs(pillows - exact))
        apart.append(np.abs(ours - pillows))
    assert np.mean([d.mean() for d in ours_off]) < 1.5 * np.mean([d.mean() for d in pillows_off])
    assert max(d.max() for d in ours_off) < 0.01
    assert max(d.mean() for d in apart) < 1.2


def test_hue_turns_red_to_green_and_blue() -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    for turn, expected in ((1 / 3, [0, 255, 0]), (-1 / 3, [0, 0, 255])):
        np.testing.assert_allclose(by_operator(red, of_one(Jitter.HUE, turn))[0, 0], expected, atol=0.01)


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarize_is_pillows(images: list[npt.NDArray[np.uint8]], threshold: int) -> None:
    plan = ImagePlan(solarize_threshold=threshold)
    assert max(np.abs(by_operator(image, plan) - pillow.recolour(image, plan)).max() for image in images) == 0


def test_flip_is_pillows(images: list[npt.NDArray[np.uint8]]) -> None:
    plan = ImagePlan(flip=True)
    assert max(np.abs(by_operator(image, plan) - pillow.recolour(image, plan)).max() for image in images) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_the_truncated_gaussian(images: list[npt.NDArray[np.uint8]], sigma: float) -> None:
    found = rounded(images, ImagePlan(blur_sigma=sigma))
    assert max(d.max() for d in found) <= 1
    assert max(d.mean() for d in found) < 0.01
