"""Multi-crop augmentation of one decoded 500 x 400 photograph on one core, beside the same in plain Pillow and NumPy.

Two global crops of 224 pixels and eight local ones of 96; ``images_per_second`` is of the fastest round. The last
benchmark is for small images, where what counts is the cost of calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dinov2.data import AugmentationConfig, BundledPhotographs, MultiCropAugmentation, augmentation, recolouring
from dinov2.data import photometric_reference as pillow

IMAGES_A_ROUND = 10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    yield
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])


def photograph(width: int, height: int) -> np.ndarray:
    photographs = BundledPhotographs()
    return photographs[photographs.names.index("astronaut")][:height, :width].copy()


def record_images_per_second(benchmark: BenchmarkFixture, config: AugmentationConfig, image: np.ndarray) -> None:
    augment, seeds = MultiCropAugmentation(config), itertools.count()

    def augment_some() -> None:
        for _ in range(IMAGES_A_ROUND):
            augment(image, np.random.default_rng(next(seeds)))

    benchmark.pedantic(augment_some, rounds=15, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = round(IMAGES_A_ROUND / benchmark.stats.stats.min, 1)


@pytest.mark.parametrize("blur", ["released", "paper"])
def test_multi_crop(benchmark: BenchmarkFixture, blur: str) -> None:
    benchmark.group = "2 x 224 + 8 x 96 from 500 x 400"
    record_images_per_second(benchmark, AugmentationConfig(blur=blur), photograph(500, 400))


def test_multi_crop_in_pillow(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.group = "2 x 224 + 8 x 96 from 500 x 400"
    monkeypatch.setattr(recolouring, "photometric", pillow)
    monkeypatch.setattr(augmentation, "resized_crop", pillow.resized_crop)
    record_images_per_second(benchmark, AugmentationConfig(), photograph(500, 400))


def test_small_images(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "2 x 32 + 4 x 16 from 48 x 48"
    config = AugmentationConfig(global_size=32, local_size=16, local_crops=4)
    record_images_per_second(benchmark, config, photograph(48, 48))
