"""Shards are worked on in pieces where there are few of them, so that all cores have work and a stop loses little.

The pieces of a shard are tables and arrays of their own; a second step joins them. Whether there are pieces depends on
the pool alone, so results are the same on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dinov2.curate.pool import Pool, column_names, read_array, read_table
from dinov2.curate.search.vectors import Layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest, read_counts
from dinov2.curate.views import SMALL_COLUMNS
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

ROWS = 64
"""Rows of a piece."""
MANY = 256
"""A pool with at least this many shards is worked on shard by shard."""


class Results(NamedTuple):
    """Folders of results.

    Attributes:
        folder: tables and arrays of whole shards.
        pieces: tables and arrays of pieces, which may have more columns; the same folder if there are no pieces.
    """

    folder: str
    pieces: str


class Piece(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of a shard.

    Attributes:
        name: name of the piece's files: that of the shard, and the first row if it is not the whole shard.
    """

    shard: str
    start: int
    stop: int
    name: str

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.stop - self.start


def pieces_of(layout: Layout) -> dict[str, list[Piece]]:
    """The pieces of each shard; a shard without rows has one piece."""
    lengths = np.diff(layout.starts).tolist()
    if len(lengths) >= MANY:
        return {shard: [Piece(shard, 0, rows, shard)] for shard, rows in zip(layout.names, lengths, strict=True)}
    return {shard: cut(shard, rows) for shard, rows in zip(layout.names, lengths, strict=True)}


def cut(shard: str, rows: int) -> list[Piece]:
    """The pieces of a shard; one without rows has one piece."""
    starts = range(0, max(rows, 1), ROWS)
    return [Piece(shard, start, min(start + ROWS, rows), name_of(shard, start)) for start in starts]


def name_of(shard: str, start: int) -> str:
    """The name of the files of the piece that begins at a row."""
    return f"{shard}.{start:08d}"


def content_of(pool: Pool, piece: Piece, *_: Any) -> str:
    """A digest of the images of a piece, and of which are in: of their bytes if the index tells these, else of the
    shard's tar."""
    index = pool.index(piece.shard, ["key", "sha256", "offset", "size"]).slice(piece.start, piece.rows).to_pydict()
    images = (
        [pool.images, piece.shard, pool.stamp(piece.shard), index["offset"], index["size"]]
        if None in index["sha256"]
        else index["sha256"]
    )
    return digest([index["key"], images, pool.kept(piece.shard)[piece.start : piece.stop].tolist()], 32)


def by_pieces(
    output: str,
    name: str,
    settings: Any,
    pool: Pool,
    layout: Layout,
    function: Callable[..., Counts],
    arguments: tuple[Any, ...] = (),
    *,
    gpu: bool = False,
    note: str = "",
) -> Steps[Results]:
    """Make columns beside the shards of a pool by a step ``name``, in pieces where there are few shards.

    When the pool changes later, pieces and shards with the same images are taken from the earlier folder.

    Args:
        output: folder or URL of the whole curation.
        name: name of the step with the results of whole shards; the pieces are a step of their own before it.
        settings: everything that the results depend on, except the images.
        pool: images that are read.
        layout: rows of the shards.
        function: makes a piece: a table, an array or both. A function as :class:`Task` wants it, called with an
            :class:`Output`, ``pool``, a :class:`Piece` and ``arguments``. What it writes depends on the images of the
            piece that are in, and on ``settings``.
        arguments: its other arguments.
        gpu: whether the tasks want a GPU.
        note: a line for people about the step.
    """
    pieces = pieces_of(layout)
    tasks = [
        Task(piece.name, function, (pool, piece, *arguments), piece.rows, content_of)
        for piece in itertools.chain.from_iterable(pieces.values())
    ]
    if len(pieces) >= MANY:
        step = Step(output, name, settings, pool.inputs, tasks, gpu=gpu, note=note)
        yield step
        return Results(step.folder, step.folder)
    first = Step(output, f"{name.partition('-')[0]}-pieces", [settings, ROWS], pool.inputs, tasks, "rows", gpu)
    yield first
    joins = [
        Task(
            shard,
            _join,
            (first.folder, tuple(piece.name for piece in own)),
            rows=own[-1].stop,
            content=partial(content_of, pool, Piece(shard, 0, own[-1].stop, shard)),
        )
        for shard, own in pieces.items()
    ]
    # Shards are lent, so settings tell the pieces' kind.
    step = Step(output, name, first.kind, (first.folder,), joins, note=note)
    yield step
    return Results(step.folder, first.folder)


def _join(output: Output, folder: str, names: tuple[str, ...]) -> Counts:
    """Task: join the tables and arrays of the pieces of a shard, without the columns of small images."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    columns = [name for name in column_names(folder, names[0]) if name not in SMALL_COLUMNS]
    output.write_table(arrow.concat_tables([read_table(folder, name, columns) for name in names]).combine_chunks())
    storage = Storage(folder)
    if storage.filesystem.exists(f"{storage.root}/{names[0]}.npy"):
        output.write_array(np.concatenate([read_array(folder, name) for name in names]))
    return sum((read_counts(folder, name) for name in names), Counts())
