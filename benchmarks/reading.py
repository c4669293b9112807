"""Reading and decoding photographs one by one in random order: loose files, tar shards and shards by fsspec.

The images are 512 JPEGs of 500 x 400 pixels, about 24 kB each, in the page cache, so that the disk does not count. The
last group leaves out the decoding.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

from dinov2.data import BundledPhotographs, ImageFolder, ShardImage, TarShards, write_shards

IMAGES = 512
IMAGES_A_ROUND = 64


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Files with different parts of one photograph, at the JPEG quality of cameras and the web."""
    photographs = BundledPhotographs()
    photograph = photographs[photographs.names.index("retina")]  # 1411 x 1411
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(IMAGES):
        top, left = rng.integers(0, 1000), rng.integers(0, 900)
        file = io.BytesIO()
        Image.fromarray(photograph[top : top + 400, left : left + 500]).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    return encoded


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://reading"
    fsspec.filesystem("memory").rm("/reading", recursive=True)


def record_images_per_second(benchmark: BenchmarkFixture, read: Callable[[int], object]) -> None:
    order = itertools.cycle(np.random.default_rng(0).permutation(IMAGES).tolist())

    def read_some() -> None:
        for _ in range(IMAGES_A_ROUND):
            read(next(order))

    benchmark.pedantic(read_some, rounds=15, warmup_rounds=8)
    benchmark.extra_info["images_per_second"] = round(IMAGES_A_ROUND / benchmark.stats.stats.median)


def shards_in(root: str, files: list[bytes]) -> TarShards:
    write_shards((ShardImage(f"{i:08x}", content) for i, content in enumerate(files)), root, shard_size=64)
    return TarShards(root)


def test_folder(benchmark: BenchmarkFixture, files: list[bytes], tmp_path: Path) -> None:
    benchmark.group = "read and decode"
    for i, content in enumerate(files):
        (tmp_path / f"{i:08x}.jpg").write_bytes(content)
    record_images_per_second(benchmark, ImageFolder(tmp_path).__getitem__)


def test_shards(benchmark: BenchmarkFixture, files: list[bytes], tmp_path: Path) -> None:
    benchmark.group = "read and decode"
    record_images_per_second(benchmark, shards_in(str(tmp_path), files).__getitem__)


def test_shards_in_memory(benchmark: BenchmarkFixture, files: list[bytes], memory: str) -> None:
    benchmark.group = "read and decode"
    record_images_per_second(benchmark, shards_in(memory, files).__getitem__)


def test_bytes_of_shards(benchmark: BenchmarkFixture, files: list[bytes], tmp_path: Path) -> None:
    benchmark.group = "read alone"
    record_images_per_second(benchmark, shards_in(str(tmp_path), files).read_bytes)


def test_bytes_of_shards_in_memory(benchmark: BenchmarkFixture, files: list[bytes], memory: str) -> None:
    benchmark.group = "read alone"
    record_images_per_second(benchmark, shards_in(memory, files).read_bytes)
