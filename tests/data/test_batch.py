"""Crops finished by the workers or on the device: the same bits, and the augmentation that was meant."""

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
    RawBatch,
    RawCrops,
    batches,
    finish,
    finishes_crops,
)
from dinov2.data import batch as batch_module
from dinov2.data.cropping import random_box
from dinov2_kernels import PhotometricPlan
from tests.photometric import pillow

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


def drawn(number: int, **options: int) -> list[Batch | RawBatch]:
    """Batches of ten images."""
    config = DataConfig(augmentation=VIEWS, num_workers=0)
    arguments = {"batch_size": 10, "patch_size": 8, "seed": 0} | options
    return list(islice(batches(Photographs(), config, **arguments), number))


def test_a_raw_batch() -> None:
    (batch,) = drawn(1, batch_size=5, raw=True)
    for name, number, size in (("global_crops", 10, 32), ("local_crops", 10, 16)):
        crops = batch[name]
        assert isinstance(crops, RawCrops)
        assert (crops.pixels.shape, crops.pixels.dtype) == ((number, size, size, 3), torch.uint8)
        assert (crops.plan.shape, crops.plan.dtype) == ((number, 12), torch.float32)
    assert batch["masks"].shape == (10, 16)


def test_without_local_crops() -> None:
    views = AugmentationConfig(global_size=16, local_size=8, local_crops=0)
    config = DataConfig(augmentation=views, num_workers=0)
    batch = finish(next(batches(Photographs(), config, batch_size=2, patch_size=8, seed=0, raw=True)), views, CPU)
    assert batch["global_crops"].shape == (4, 3, 16, 16)
    assert batch["local_crops"].shape == (0, 3, 8, 8)


def test_a_finished_batch_is_only_moved() -> None:
    (batch,) = drawn(1)
    moved = finish(batch, VIEWS, torch.device("meta"))
    assert moved["global_crops"].device.type == moved["local_crops"].device.type == "meta"
    assert moved["masks"].device.type == "cpu"
    assert all(finish(batch, VIEWS, CPU)[name] is batch[name] for name in batch)


def test_workers_and_the_device_finish_alike() -> None:
    """One operator carries out the plans; on one device its results are the same bits, wherever it is called."""
    for workers, raw in zip(drawn(10), drawn(10, raw=True), strict=True):
        device = finish(raw, VIEWS, CPU)
        for name in ("global_crops", "local_crops", "masks"):
            assert torch.equal(workers[name], device[name])


def test_crop_by_crop_that_of_pillow_but_for_rounding() -> None:
    """Pillow rounds to whole levels after each of up to six steps, down or to the nearest, and the hue to a 256th of
    the circle. A level that another draw had chosen would be off by tens."""
    differences = []
    for batch in drawn(10, raw=True):
        finished = finish(batch, VIEWS, CPU)
        for name in ("global_crops", "local_crops"):
            plans = PhotometricPlan(batch[name].plan).images()
            for pixels, plan, crop in zip(batch[name].pixels, plans, finished[name], strict=True):
                expected = pillow.recolour(pixels.numpy(), plan).transpose(2, 0, 1)
                differences.append(np.abs(crop.numpy() - expected).mean())
    assert len(differences) == 10 * 10 * 4
    assert np.mean(differences) < 1.2
    assert max(differences) < 4


def by_the_paper(image: npt.NDArray[np.uint8], number: int, rng: np.random.Generator) -> Levels:
    """Crop ``number`` of an image, written down once more with Pillow's operations and draws of its own."""
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


def test_distributions_are_those_of_the_paper(of_the_paper: dict[tuple[int, str], list[float]]) -> None:
    """Two-sample Kolmogorov-Smirnov tests, at the distance that equal distributions exceed once in a thousand times.

    Seeds are fixed, so what passes once passes always.
    """
    found = drawn(IMAGES // 10, seed=1)
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


def test_gpus_with_kernels_finish_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed in (True, False):
        monkeypatch.setattr(batch_module, "triton_is_installed", lambda installed=installed: installed)
        assert finishes_crops(torch.device("cuda", 1)) == installed
        assert not finishes_crops(CPU)
        assert not finishes_crops(torch.device("mps"))


def test_images_of_other_channels_are_never_raw() -> None:
    """They may differ in their type, and the operator is for RGB."""
    views = AugmentationConfig(global_size=16, local_size=8, local_crops=1, mean=(0.5,) * 2, std=(0.2,) * 2)
    images = [np.full((20, 20, 2), 0.5, np.float32), np.full((20, 20, 2), 128, np.uint8)]
    config = DataConfig(augmentation=views, num_workers=0)
    raw, finished = (
        next(batches(images, config, batch_size=2, patch_size=8, seed=0, raw=raw)) for raw in (True, False)
    )
    for name in ("global_crops", "local_crops"):
        assert raw[name].dtype == torch.float32
        assert torch.equal(raw[name], finished[name])
