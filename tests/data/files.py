"""Images, their files and tars, for the tests of datasets."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data import ShardImage


def noise(seed: int, height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)


def encode(image: np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def encode_array(array: np.ndarray) -> bytes:
    """The bytes of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def shard_images(number: int, first: int = 0) -> list[ShardImage]:
    """Image ``i`` is ``noise(i)``."""
    return [
        ShardImage(f"{i:032x}", encode(noise(i)), {"url": f"https://x.org/{i}"}) for i in range(first, first + number)
    ]


def write_tar(path: Path, files: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """A plain tar, as any other program writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path
