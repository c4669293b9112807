"""A folder of images as a dataset: any nesting, no labels, no metadata files."""

from __future__ import annotations

import os
from pathlib import Path

from dinov2.data.decoding import IMAGE_EXTENSIONS, Pixels, read_image


class ImageFolder:
    """All images under a folder, in sorted order of their relative paths.

    A map-style dataset: ``len(folder)``, ``folder[i]`` -> uint8 RGB ``[H, W, 3]``, or as
    :func:`read_image` says for other numbers of channels; ``folder.paths[i]``. Links to folders are followed; names
    that start with a dot (hidden files, macOS companions) are not images.

    Args:
        root: the folder.
        channels: of every image.

    Raises:
        ValueError: ``root`` is no folder, or there is no image under it.
        OSError: a folder under it cannot be listed.
    """

    def __init__(self, root: str | os.PathLike[str], channels: int = 3) -> None:
        self.root = Path(root)
        self.channels = channels
        if not self.root.is_dir():
            raise ValueError(f"root must be a folder of images, but {os.fspath(root)!r} is not a folder")
        self.paths = sorted(
            os.path.relpath(os.path.join(folder, name), self.root)
            for folder, _, names in os.walk(self.root, onerror=_refuse, followlinks=True)
            for name in names
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
        )
        if not self.paths:
            raise ValueError(
                f"root must hold images ({', '.join(IMAGE_EXTENSIONS)}), but {os.fspath(root)!r} has none at any depth"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pixels:
        """Image ``index``, ``[H, W, channels]``.

        Raises:
            UnreadableImageError: the file cannot be decoded; the message names it.
        """
        return read_image(self.root / self.paths[index], self.channels)


def _refuse(error: OSError) -> None:
    """Images that are missing unnoticed would make another dataset."""
    raise type(error)(f"folder {error.filename!r} under root cannot be listed: {error.strerror}") from error
