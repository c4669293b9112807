"""Random resized crops against Pillow's, on noise and on photographs."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from dinov2.data import BundledPhotographs, cropping
from tests.photometric import pillow


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3)).astype(np.uint8)
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (9, 1, 3))
    return [noise, ramp, *(photograph[100:250, 100:290] for photograph in BundledPhotographs(colour_only=True))]


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
        ours, pillows = cropping.resized_crop(image, box, size), pillow.resized_crop(image, box, size)
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
    assert np.abs(ours - pillow.resized_crop(images[2], box, 16)).max() <= 1


def test_crop_accepts_images_that_may_not_be_written(images: list[np.ndarray]) -> None:
    image = images[2].copy()
    image.flags.writeable = False
    np.testing.assert_array_equal(cropping.resized_crop(image, (0, 0, 32, 32), 32), image[:32, :32])
