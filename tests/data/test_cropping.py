"""Each operation against Pillow's, on noise and on photographs."""

import numpy as np
import pytest
import torch
from skimage import color
from torch.nn import functional

from dinov2.data import BundledPhotographs, cropping, photometric, photometric_reference


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (9, 1, 3))
    return [noise, ramp, *(photograph[100:250, 100:290] for photograph in BundledPhotographs(colour_only=True))]


def differences(images: list[np.ndarray], name: str, *arguments: object) -> list[np.ndarray]:
    results = []
    for image in images:
        before = image.copy()
        ours = getattr(photometric, name)(image, *arguments)
        np.testing.assert_array_equal(image, before)
        assert ours.dtype == np.uint8
        assert ours.shape == image.shape
        results.append(np.abs(ours.astype(int) - getattr(photometric_reference, name)(image, *arguments)))
    return results


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast"])
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.97, 1.0, 1.4, 2.0])
def test_brightness_and_contrast_are_pillows(images: list[np.ndarray], name: str, factor: float) -> None:
    assert max(d.max() for d in differences(images, name, factor)) == 0


@pytest.mark.parametrize("factor", [0.0, 0.8, 1.0, 1.2])
def test_saturation_is_pillows_but_for_rounding(images: list[np.ndarray], factor: float) -> None:
    assert max(d.max() for d in differences(images, "adjust_saturation", factor)) <= 1


def test_grayscale_is_pillows_but_for_rounding(images: list[np.ndarray]) -> None:
    found = differences(images, "grayscale")
    assert max(d.max() for d in found) <= 1
    assert max(d.mean() for d in found) < 0.01


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1])
def test_hue_is_pillows_within_its_own_error(images: list[np.ndarray], turn: float) -> None:
    """8-bit HSV rounds coarsely; both are compared with HSV in double precision, turned by the same angle."""
    ours_off, pillows_off = [], []
    for image in images:
        hsv = color.rgb2hsv(image)
        hsv[..., 0] = (hsv[..., 0] + round(turn * 256) / 256) % 1
        exact = 255 * color.hsv2rgb(hsv)
        ours_off.append(np.abs(photometric.adjust_hue(image, turn) - exact))
        pillows_off.append(np.abs(photometric_reference.adjust_hue(image, turn) - exact))
    assert np.mean([d.mean() for d in ours_off]) < 1.5 * np.mean([d.mean() for d in pillows_off])
    assert max(d.max() for d in ours_off) < 10
    assert max(d.mean() for d in differences(images, "adjust_hue", turn)) < 1.2


def test_hue_turns_red_to_green_and_blue() -> None:
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 255
    np.testing.assert_allclose(photometric.adjust_hue(red, 1 / 3)[0, 0], [0, 255, 0], atol=6)  # a step of the 8-bit hue
    np.testing.assert_allclose(
        photometric.adjust_hue(red, -1 / 3)[0, 0], [0, 0, 255], atol=6
    )  # a step of the 8-bit hue


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarize_is_pillows(images: list[np.ndarray], threshold: int) -> None:
    assert max(d.max() for d in differences(images, "solarize", threshold)) == 0


def test_flip_is_pillows(images: list[np.ndarray]) -> None:
    assert max(d.max() for d in differences(images, "flip")) == 0


@pytest.mark.parametrize("kernel_size", [3, 9])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_the_truncated_gaussian(images: list[np.ndarray], sigma: float, kernel_size: int) -> None:
    found = differences(images, "gaussian_blur", sigma, kernel_size)
    assert max(d.max() for d in found) <= 1
    assert max(d.mean() for d in found) < 0.01


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0)])
def test_crop_is_as_exact_as_pillows(images: list[np.ndarray], scale: tuple[float, float], size: int) -> None:
    """Enlarged and reduced (there the antialiasing shows); both are compared with the filter in double precision."""
    rng = np.random.default_rng(0)
    ours_off, pillows_off = [], []
    for image in images[2:] * 3:
        height, width, _ = image.shape
        box = cropping.random_box(width, height, scale=scale, ratio=(3 / 4, 4 / 3), rng=rng)
        left, top, right, bottom = box
        planes = torch.from_numpy(image[top:bottom, left:right].transpose(2, 0, 1).astype(np.float64))
        exact = functional.interpolate(planes[None], (size, size), mode="bicubic", antialias=True)[0]  # [3, size, size]
        ours, pillows = cropping.resized_crop(image, box, size), photometric_reference.resized_crop(image, box, size)
        assert ours.dtype == np.uint8
        assert ours.shape == (size, size, 3)
        assert (np.abs(ours.astype(int) - pillows) > 1).mean() < 0.002
        ours_off.append(ours - exact.clamp(0, 255).permute(1, 2, 0).numpy())
        pillows_off.append(pillows - exact.clamp(0, 255).permute(1, 2, 0).numpy())
    assert np.mean([np.abs(d).mean() for d in ours_off]) < 1.05 * np.mean([np.abs(d).mean() for d in pillows_off])
    assert abs(np.mean([d.mean() for d in ours_off])) < 0.02


@pytest.mark.parametrize("box", [(17, 5, 18, 140), (17, 5, 140, 6)])
def test_crop_one_pixel_wide(images: list[np.ndarray], box: tuple[int, int, int, int]) -> None:
    ours = cropping.resized_crop(images[2], box, 16).astype(int)
    assert np.abs(ours - photometric_reference.resized_crop(images[2], box, 16)).max() <= 1


def test_crop_accepts_images_that_may_not_be_written(images: list[np.ndarray]) -> None:
    image = images[2].copy()
    image.flags.writeable = False
    np.testing.assert_array_equal(cropping.resized_crop(image, (0, 0, 32, 32), 32), image[:32, :32])
