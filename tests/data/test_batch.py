"""Both ways to finish crops, by the workers and on the device: the same draws, and the augmentation that was meant."""

from __future__ import annotations

import itertools
import math
from itertools import islice

import numpy as np
import numpy.typing as npt
import pytest
import torch

from dinov2.data import (
    AugmentationConfig,
    Batch,
    BundledPhotographs,
    DataConfig,
    RawCrops,
    batches,
    finish,
    photometric_reference,
)
from dinov2.data.cropping import random_box
from dinov2.data.loader import Photometric

CPU = torch.device("cpu")
IN_LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
VIEWS = AugmentationConfig(global_size=32, local_size=16, local_crops=2, **IN_LEVELS)
Levels = npt.NDArray[np.float32]  # [3, H, W]


class Photographs:
    """Parts of photographs in colour."""

    def __init__(self) -> None:
        self.images = [photograph[80:240, 80:280] for photograph in BundledPhotographs(colour_only=True)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        return self.images[index]


def drawn(photometric: Photometric, number: int, **options: int) -> list[Batch]:
    """Finished batches of ten images."""
    config = DataConfig(augmentation=VIEWS, num_workers=0, photometric=photometric)
    arguments = {"batch_size": 10, "patch_size": 8, "seed": 0} | options
    return [finish(batch, VIEWS, CPU) for batch in islice(batches(Photographs(), config, **arguments), number)]


def crops_of(found: list[Batch]) -> list[Levels]:
    return [crop.numpy() for batch in found for name in ("global_crops", "local_crops") for crop in batch[name]]


def test_a_raw_batch() -> None:
    config = DataConfig(augmentation=VIEWS, num_workers=0, photometric="device")
    batch = next(batches(Photographs(), config, batch_size=5, patch_size=8, seed=0))
    for name, number, size in (("global_crops", 10, 32), ("local_crops", 10, 16)):
        crops = batch[name]
        assert isinstance(crops, RawCrops)
        assert (crops.pixels.shape, crops.pixels.dtype) == ((number, size, size, 3), torch.uint8)
        assert (crops.plan.shape, crops.plan.dtype) == ((number, 12), torch.float32)
    assert batch["masks"].shape == (10, 16)


def test_without_local_crops() -> None:
    views = AugmentationConfig(global_size=16, local_size=8, local_crops=0)
    config = DataConfig(augmentation=views, num_workers=0, photometric="device")
    batch = finish(next(batches(Photographs(), config, batch_size=2, patch_size=8, seed=0)), views, CPU)
    assert batch["global_crops"].shape == (4, 3, 16, 16)
    assert batch["local_crops"].shape == (0, 3, 8, 8)


def test_a_finished_batch_is_only_moved() -> None:
    config = DataConfig(augmentation=VIEWS, num_workers=0)
    batch = next(batches(Photographs(), config, batch_size=2, patch_size=8, seed=0))
    moved = finish(batch, VIEWS, torch.device("meta"))
    assert moved["global_crops"].device.type == moved["local_crops"].device.type == "meta"
    assert moved["masks"].device.type == "cpu"
    assert all(finish(batch, VIEWS, CPU)[name] is batch[name] for name in batch)


def test_crop_by_crop_the_same_but_for_rounding() -> None:
    """Workers round to whole levels after each of up to six steps, down or to the nearest, and the hue to a 256th of
    the circle: in docs/operators/photometric.md 0.84 levels of an image on average, and 2.2 at most. A level that
    another draw had chosen would be off by tens."""
    workers, device = drawn("workers", 10), drawn("device", 10)
    differences = [np.abs(a - b).mean() for a, b in zip(crops_of(workers), crops_of(device), strict=True)]
    assert len(differences) == 10 * 10 * 4
    assert np.mean(differences) < 1.2
    assert max(differences) < 4
    assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(workers, device, strict=True))


def by_the_paper(image: npt.NDArray[np.uint8], number: int, rng: np.random.Generator) -> Levels:
    """Crop ``number`` of an image, written down once more with Pillow's operations and draws of its own."""
    pillow = photometric_reference
    size, scale = (32, (0.32, 1.0)) if number < 2 else (16, (0.05, 0.32))
    height, width, _ = image.shape
    crop = pillow.resized_crop(image, random_box(width, height, scale=scale, ratio=(3 / 4, 4 / 3), rng=rng), size)
    if rng.random() < 0.5:
        crop = pillow.flip(crop)
    if rng.random() < 0.8:
        jitters = [
            (pillow.adjust_brightness, 0.6, 1.4),
            (pillow.adjust_contrast, 0.6, 1.4),
            (pillow.adjust_saturation, 0.8, 1.2),
            (pillow.adjust_hue, -0.1, 0.1),
        ]
        for index in rng.permutation(4):
            adjust, low, high = jitters[index]
            crop = adjust(crop, rng.uniform(low, high))
    if rng.random() < 0.2:
        crop = pillow.grayscale(crop)
    if rng.random() < (0.0, 0.9, 0.5, 0.5)[number]:
        crop = pillow.gaussian_blur(crop, rng.uniform(0.1, 2.0), 9)
    if rng.random() < (0.0, 0.2, 0.0, 0.0)[number]:
        crop = pillow.solarize(crop, 128)
    return crop.transpose(2, 0, 1).astype(np.float32)


STATISTICS = {
    "mean": lambda crop: crop.mean(),
    "red": lambda crop: crop[0].mean(),
    "contrast": lambda crop: crop.std(axis=(1, 2)).mean(),
    "saturation": lambda crop: (crop.max(axis=0) - crop.min(axis=0)).mean(),
    "sharpness": lambda crop: np.abs(np.diff(crop, axis=2)).mean(),
}


IMAGES = 400


@pytest.fixture(scope="module")
def of_the_paper() -> dict[tuple[int, str], list[float]]:
    """Each statistic of each of four crops, over all images."""
    images = Photographs()
    found: dict[tuple[int, str], list[float]] = {}
    for number, i in itertools.product(range(4), range(IMAGES)):
        crop = by_the_paper(images[i % 10], number, np.random.default_rng((2, i, number)))
        for name, statistic in STATISTICS.items():
            found.setdefault((number, name), []).append(statistic(crop))
    return found


@pytest.mark.parametrize("photometric", ["workers", "device"])
def test_distributions_are_those_of_the_paper(
    photometric: Photometric, of_the_paper: dict[tuple[int, str], list[float]]
) -> None:
    """Two-sample Kolmogorov-Smirnov tests, at the distance that equal distributions exceed once in a thousand times.

    Seeds are fixed, so what passes once passes always.
    """
    found = drawn(photometric, IMAGES // 10, seed=1)
    for number in range(4):
        name, place = ("global_crops", number) if number < 2 else ("local_crops", number - 2)
        crops = [crop.numpy() for batch in found for crop in batch[name][10 * place :][:10]]
        for statistic, function in STATISTICS.items():
            distance = kolmogorov_smirnov([function(crop) for crop in crops], of_the_paper[number, statistic])
            assert distance < 1.95 * math.sqrt(2 / IMAGES), (number, statistic)


def kolmogorov_smirnov(first: list[float], second: list[float]) -> float:
    """The largest difference of two samples' cumulative distributions."""
    a, b = np.sort(first), np.sort(second)
    values = np.concatenate([a, b])
    shares = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_what_the_device_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="photometric must be one of workers, device, but is 'gpu'"):
        DataConfig(photometric="gpu")
    with pytest.raises(ValueError, match=r"photometric must be workers for the 2 channels of augmentation\.mean and"):
        DataConfig(photometric="device", augmentation=AugmentationConfig(mean=(0.5, 0.5), std=(0.2, 0.2)))
    with pytest.raises(ValueError, match=r"augmentation\.blur_kernel must be 9 with photometric device, but is 5"):
        DataConfig(photometric="device", augmentation=AugmentationConfig(blur_kernel=5))
