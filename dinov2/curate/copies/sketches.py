"""Sketches of a pool's images: made once, and read wherever two images are compared."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from dinov2.curate import pieces
from dinov2.curate.copies.points import CONTRAST, POINTS, QUALITY, SIDE, Sketch, packed, unpacked
from dinov2.curate.pieces import Piece, content_of, cut, name_of
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.repeats import originals
from dinov2.curate.search.vectors import Layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.curate.views import SMALL_SIDE, small_images
from dinov2.data.decoding import UnreadableImageError
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

Reader = Callable[[str, int], Sketch | None]

REMEMBERED = 500
"""Sketches that are remembered, of half a megabyte each."""
OPENED = 48
"""Tables that are remembered, of some five megabytes each."""


def sketched(pool: Pool, layout: Layout, output: str, stage: str) -> Steps[Pool]:
    """Make the sketches of the images that are still in, unless the pool has them.

    A table ``SHARD.ROW.parquet`` has the column ``sketch``, as :func:`~dinov2.curate.copies.points.packed` makes it,
    for :data:`~dinov2.curate.pieces.ROWS` rows from ``ROW`` on. It is null for rows that are out or unreadable.

    Args:
        pool: images.
        layout: rows of its shards.
        output: folder or URL of the whole curation.
        stage: first part of the steps' names.

    Returns:
        The pool with its sketches.
    """
    if pool.sketches is not None:
        return pool
    lengths = zip(layout.names, np.diff(layout.starts).tolist(), strict=True)
    parts = [piece for shard, rows in lengths for piece in cut(shard, rows)]
    tasks = [Task(piece.name, _sketch, (pool, piece), piece.rows, content_of) for piece in parts]
    settings = [pieces.ROWS, SIDE, POINTS, CONTRAST, QUALITY, SMALL_SIDE]
    step = Step(output, f"{stage}-sketches", settings, pool.inputs, tasks)
    yield step
    return dataclasses.replace(pool, sketches=step.folder)


def _sketch(output: Output, pool: Pool, piece: Piece) -> Counts:
    """Task: write the sketches of a piece of a shard. Files with the same bytes are sketched once."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    read = small_images(pool, piece.shard, piece.start, piece.name)
    rows = piece.start + np.flatnonzero(pool.kept(piece.shard)[piece.start : piece.stop])
    made: dict[int, bytes] = {}
    contents: list[bytes | None] = [None] * piece.rows
    for row, first in zip(rows.tolist(), originals(pool, piece.shard, rows).tolist(), strict=True):
        output.advance()
        if row == first:
            try:
                made[row] = packed(read(row))
            except UnreadableImageError:
                continue  # it shows nothing, so it is no copy of anything
        contents[row - piece.start] = made.get(first)
    output.write_table({"sketch": arrow.array(contents, arrow.binary())})
    return Counts(len(rows), sum(content is not None for content in contents))


def open_sketches(pool: Pool) -> Reader:
    """A function that returns the sketch of row ``row`` of a shard: None if it could not be read. It remembers the last
    ones.

    Args:
        pool: a pool with sketches.
    """
    if pool.sketches is None:
        raise ValueError("pool: expected sketches, got none")
    folder = pool.sketches
    starts: dict[str, list[int]] = defaultdict(list)  # first rows of the tables
    for name in sorted(Storage(folder).files("", ".parquet")):
        shard, _, start = name.rpartition(".")
        starts[shard].append(int(start))

    @functools.lru_cache(OPENED)
    def column(name: str) -> Any:
        return read_table(folder, name, ["sketch"])["sketch"]

    @functools.lru_cache(REMEMBERED)
    def read(shard: str, row: int) -> Sketch | None:
        start = starts[shard][bisect.bisect(starts[shard], row) - 1]
        content = column(name_of(shard, start))[row - start].as_py()
        return None if content is None else unpacked(content)

    return read
