"""Multi-crop augmentation of one decoded 500 x 400 photograph on one core, beside the same in plain Pillow and NumPy.

An image gives two global crops of 224 pixels and eight local ones of 96; ``images_per_second`` is that of the fastest
round. One benchmark uses small images, where the cost of calls counts most. Two begin at JPEG files, as training does.
The last ones make batches as training gets them, on all cores. The workers finish the crops, or the device does, which
is the CPU here.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from dinov2.data import (
    AugmentationConfig,
    BundledPhotographs,
    DataConfig,
    ImageFolder,
    MultiCropAugmentation,
    augmentation,
    batches,
    finish,
    normalize,
)
from tests.photometric import pillow

IMAGES_A_ROUND = 10


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photograph(width: int, height: int) -> np.ndarray:
    photographs = BundledPhotographs()
    return photographs[photographs.names.index("astronaut")][:height, :width].copy()


def record_images_per_second(
    benchmark: BenchmarkFixture, config: AugmentationConfig, image: np.ndarray, method: str = "__call__"
) -> None:
    augment, seeds = getattr(MultiCropAugmentation(config), method), itertools.count()

    def augment_some() -> None:
        for _ in range(IMAGES_A_ROUND):
            augment(image, np.random.default_rng(next(seeds)))

    benchmark.pedantic(augment_some, rounds=15, warmup_rounds=1)
    benchmark.extra_info["images_per_second"] = round(IMAGES_A_ROUND / benchmark.stats.stats.min, 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("blur", ["released", "paper"])
def test_multi_crop(benchmark: BenchmarkFixture, blur: str) -> None:
    benchmark.group = "2 x 224 + 8 x 96 from 500 x 400"
    record_images_per_second(benchmark, AugmentationConfig(blur=blur), photograph(500, 400))


@pytest.mark.usefixtures("one_thread")
def test_cut_alone(benchmark: BenchmarkFixture) -> None:
    """The work of a worker if the device finishes the crops."""
    benchmark.group = "2 x 224 + 8 x 96 from 500 x 400"
    record_images_per_second(benchmark, AugmentationConfig(), photograph(500, 400), "cut")


@pytest.mark.usefixtures("one_thread")
def test_multi_crop_in_pillow(benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.group = "2 x 224 + 8 x 96 from 500 x 400"

    def by_pillow(augment: MultiCropAugmentation, crops: list[augmentation.Crop]) -> list[np.ndarray]:
        return [normalize(pillow.recolour(*crop), augment.config.mean, augment.config.std) for crop in crops]

    monkeypatch.setattr(MultiCropAugmentation, "finish", by_pillow)
    monkeypatch.setattr(augmentation, "resized_crop", pillow.resized_crop)
    record_images_per_second(benchmark, AugmentationConfig(), photograph(500, 400))


@pytest.mark.usefixtures("one_thread")
def test_small_images(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "2 x 32 + 4 x 16 from 48 x 48"
    config = AugmentationConfig(global_size=32, local_size=16, local_crops=4)
    record_images_per_second(benchmark, config, photograph(48, 48))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("width", "height"), [(500, 400), (1632, 1224)])
def test_from_files(benchmark: BenchmarkFixture, tmp_path: Path, width: int, height: int) -> None:
    """JPEGs from the page cache to finished batches of 8, on one core; the larger ones have 2 megapixels and noise."""
    benchmark.group = f"JPEGs of {width} x {height} to batches of 8 x (2 x 224 + 8 x 96), one core"
    rng = np.random.default_rng(0)
    resized = Image.fromarray(photograph(500, 400)).resize((width, height), Image.Resampling.BICUBIC)
    for i in range(8):
        noisy = np.asarray(resized) + rng.normal(0, 6, (height, width, 3))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        (tmp_path / f"{i}.jpg").write_bytes(file.getvalue())
    config = DataConfig(num_workers=0)
    with closing(batches(ImageFolder(tmp_path), config, batch_size=8, patch_size=16, seed=0)) as stream:
        benchmark.pedantic(lambda: next(stream), rounds=15, warmup_rounds=2)
    benchmark.extra_info["images_per_second"] = round(8 / benchmark.stats.stats.min, 1)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("finished_by", ["workers", "device"])
def test_batches(benchmark: BenchmarkFixture, finished_by: str, workers: int) -> None:
    """Finished batches of 32 images, without training between them."""
    benchmark.group = "batches of 32 x (2 x 224 + 8 x 96), on all cores"
    images = np.stack([photograph(500, 400)] * 8)
    config, raw = DataConfig(num_workers=workers), finished_by == "device"
    with closing(batches(images, config, batch_size=32, patch_size=16, seed=0, raw=raw)) as stream:

        def next_batch() -> None:
            finish(next(stream), config.augmentation, torch.device("cpu"))

        benchmark.pedantic(next_batch, rounds=15, warmup_rounds=5)  # more batches than workers prepare ahead
    benchmark.extra_info["images_per_second"] = round(32 / benchmark.stats.stats.median, 1)
