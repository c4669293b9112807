"""Small images, and pools of them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.curate.pool import Pool
from dinov2.data import ShardImage, write_shard
from dinov2.data.decoding import Pixels


def picture(seed: int, width: int = 96, height: int = 96) -> Pixels:
    """A photograph of nothing: coarse and fine structure, the same for a seed at any size."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    fine = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((width, height), 3)
    return np.asarray(Image.blend(coarse, fine, 0.4))


def encoded(pixels: Pixels, kind: str = "PNG", **options: object) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def write_pool(root: Path, shards: list[Mapping[str, bytes]]) -> Pool:
    """A pool of files by key, one mapping a shard. Files of any content are written, as a crawl would have them."""
    for number, files in enumerate(shards):
        write_shard([ShardImage(key, content) for key, content in files.items()], root, number)
    return Pool(str(root))
