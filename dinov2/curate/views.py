"""What the stages see of an image: its pixels at a bounded size, decoded once where that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dinov2.curate.faces import Box
from dinov2.curate.pool import Pool, read_table
from dinov2.data.decoding import Pixels
from dinov2.data.decoding_reduced import Reduced, decode_reduced
from dinov2.data.reducing import reduced, target_size

VIEW_SIDE = 768
"""Detectors of faces and scorers get images with at most this many pixels on the longer side."""
SMALL_SIDE = 256
"""The same for built-in features, whose histograms and views need no more."""
FUNCTION_SIDE = 1024
"""The same for functions of users that compute features."""
SLOW_PIXELS = 2**20
"""Small images of larger files are kept by screening, so that no later stage decodes these files again."""
SMALL_COLUMNS = ("small", "small_height", "small_width")
BATCH_PIXELS = 2**25
"""A batch with this many pixels is full: 100 MB, whatever the images."""


def small_of(view: Pixels) -> Pixels:
    """The small image of a decoded image, uint8 [h, w, 3]."""
    height, width = view.shape[:2]
    target = target_size(width, height, SMALL_SIDE, 0)
    if target == (width, height):
        return view
    return np.asarray(reduced(lambda top, bottom: Image.fromarray(view[top:bottom]), width, height, target))


def small_columns(image: Reduced, small: Pixels) -> dict[str, Any]:
    """Columns that hold the small image of a large file; none for other files."""
    if image.width * image.height <= SLOW_PIXELS:
        return {}
    return dict(zip(SMALL_COLUMNS, (small.tobytes(), *small.shape[:2]), strict=True))


def small_from(row: dict[str, Any]) -> Pixels | None:
    """The small image in a row with :func:`small_columns`, if there is one."""
    if row["small"] is None:
        return None
    return np.frombuffer(row["small"], np.uint8).reshape(row["small_height"], row["small_width"], 3)


def small_images(pool: Pool, shard: str, start: int, name: str) -> Callable[[int], Pixels]:
    """A function that returns the small image of a row of a piece, which begins at row ``start``: as screening kept it,
    or else decoded. It raises an UnreadableImageError if it cannot be decoded."""
    files, side = pool.open_images(shard), pool.view_side or SMALL_SIDE
    table = None if pool.small is None else read_table(pool.small, name, SMALL_COLUMNS)

    def read(row: int) -> Pixels:
        kept = None if table is None else small_from(table.slice(row - start, 1).to_pylist()[0])
        return small_of(decode_reduced(files[row], f"{row} of {shard}", side).pixels) if kept is None else kept

    return read


def in_full(box: Box, image: Reduced) -> Box:
    """A box in a reduced image, in pixels of the image in full."""
    height, width = image.pixels.shape[:2]
    return _scaled(box, (width, height), (image.width, image.height))


def in_reduced(box: Box, image: Reduced) -> Box:
    """A box in the image in full, in pixels of the reduced image."""
    height, width = image.pixels.shape[:2]
    return _scaled(box, (image.width, image.height), (width, height))


def _scaled(box: Box, old: tuple[int, int], new: tuple[int, int]) -> Box:
    """A box in an image of another width and height, by its edges."""
    left, right = (round(x * new[0] / old[0]) for x in (box.x, box.x + box.width))
    top, bottom = (round(y * new[1] / old[1]) for y in (box.y, box.y + box.height))
    return Box(left, top, right - left, bottom - top)
