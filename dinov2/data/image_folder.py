"""A folder of images as a dataset: any nesting, no labels, no metadata files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

IMAGE_EXTENSIONS = (
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)


class UnreadableImageError(ValueError):
    """An image file is damaged, too large to be safe, or in a format that is not read."""


class ImageFolder:
    """All images under a folder, in sorted order of their relative paths.

    A map-style dataset: ``len(folder)``, ``folder[i]`` -> uint8 RGB ``[H, W, 3]``, ``folder.paths[i]``. Links to
    folders are followed; names that start with a dot (hidden files, macOS companions) are not images.

    Args:
        root: the folder.

    Raises:
        ValueError: ``root`` is no folder, or there is no image under it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"root must be a folder of images, but {os.fspath(root)!r} is not a folder")
        self.paths = sorted(
            os.path.relpath(os.path.join(folder, name), self.root)
            for folder, _, names in os.walk(self.root, followlinks=True)
            for name in names
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
        )
        if not self.paths:
            raise ValueError(
                f"root must hold images ({', '.join(IMAGE_EXTENSIONS)}), but {os.fspath(root)!r} has none at any depth"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index``, uint8 RGB ``[H, W, 3]``.

        Raises:
            UnreadableImageError: the file cannot be decoded; the message names it.
        """
        return read_image(self.root / self.paths[index])


def read_image(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Decode an image file to uint8 RGB ``[H, W, 3]``.

    The orientation that a camera noted in EXIF is applied, so that photographs stand upright as in every viewer (the
    reference implementation ignores it). Transparency is dropped, 16-bit greys are reduced to their upper 8 bits, of an
    animation the first frame counts. Pillow's limit on the number of pixels holds.

    Raises:
        UnreadableImageError: the file is missing, damaged, truncated, above Pillow's limit, or of 32 bits a channel.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.mode in ("I", "F"):
                raise ValueError(f"32 bits a channel (Pillow mode {upright.mode}) have no defined range")
            return np.asarray(upright.convert("RGB"))
    except Exception as error:  # damaged files raise almost anything from Pillow's decoders
        raise UnreadableImageError(f"cannot read image {os.fspath(path)!r}: {error}") from error
