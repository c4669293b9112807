"""Sketches of a pool's images: made once, then read by every comparison of two images."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from dinov2.curate.copies import Comparison, Sketch, compare
from dinov2.curate.copies.points import CONTRAST, POINTS, QUALITY, SIDE, packed, unpacked
from dinov2.curate.pool import Pool, read_array, read_table
from dinov2.curate.search import Layout
from dinov2.curate.search.vectors import read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.decoding import UnreadableImageError
from dinov2.data.decoding_reduced import decode_reduced

ROWS = 128
"""Rows of a file of sketches."""
REMEMBERED = 500
"""Sketches that a task remembers, of half a megabyte each."""


def sketched(pool: Pool, layout_folder: str, output: str, stage: str) -> Steps[str]:
    """Write the sketches of the images that are still in; the value is their folder.

    A file ``SHARD.ROW.npy`` has the bytes of :data:`ROWS` rows from ``ROW`` on, one after the other, and
    ``SHARD.ROW.parquet`` a row for each with the column ``end``, where its bytes end. A row that is out has none.
    """
    layout, tasks = read_layout(layout_folder), []
    for shard in layout.names:
        start, stop = layout.range_of(shard)
        for row in range(0, stop - start, ROWS):
            end = min(row + ROWS, stop - start)
            tasks.append(Task(_name(shard, row), _sketch, (pool, shard, row, end), end - row))
    settings = [ROWS, SIDE, POINTS, CONTRAST, QUALITY]
    step = Step(output, f"{stage}-sketches", settings, (pool.images, *pool.decisions, layout_folder), tasks)
    yield step
    return step.folder


def _name(shard: str, row: int) -> str:
    return f"{shard}.{row:08d}"


def _sketch(output: Output, pool: Pool, shard: str, start: int, stop: int) -> Counts:
    """Task: write the sketches of some rows of a shard."""
    files, kept = pool.open_images(shard), pool.kept(shard)[start:stop]
    contents, made = [b""] * len(kept), 0
    for place in np.flatnonzero(kept).tolist():
        try:
            contents[place] = packed(decode_reduced(files[start + place], f"{start + place} of {shard}", SIDE).pixels)
        except UnreadableImageError:
            continue  # it shows nothing, so it is no copy of anything
        made += 1
        output.advance(1)
    output.write_table({"end": np.cumsum([len(content) for content in contents])})
    output.write_array(np.frombuffer(b"".join(contents) + b"\0", np.uint8))  # an empty file cannot be memory-mapped
    return Counts(int(kept.sum()), made)


class Sketches:
    """The sketches of a pool's images by position. The last ones are remembered.

    Args:
        folder: folder that :func:`sketched` wrote.
        layout: positions of the pool's rows.
    """

    def __init__(self, folder: str, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._remembered: OrderedDict[int, Sketch | None] = OrderedDict()
        self._opened: OrderedDict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]] = OrderedDict()

    def compare(self, position: int, others: Sketches, other: int) -> Comparison:
        """Compare an image with an image of another pool. One that cannot be read shows nothing."""
        first, second = self[position], others[other]
        return Comparison() if first is None or second is None else compare(first, second)

    def __getitem__(self, position: int) -> Sketch | None:
        """The sketch of an image; None if it could not be read."""
        if position not in self._remembered:
            self._remembered[position] = self._read(position)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(position)
        return self._remembered[position]

    def _read(self, position: int) -> Sketch | None:
        numbers, rows = self._layout.locate(np.array([position]))
        place = int(rows[0]) % ROWS
        name = _name(self._layout.names[int(numbers[0])], int(rows[0]) - place)
        if name not in self._opened:
            self._opened[name] = read_table(self._folder, name)["end"].to_numpy(), read_array(self._folder, name)
            if len(self._opened) > REMEMBERED // ROWS:  # remote arrays are in memory
                self._opened.popitem(last=False)
        self._opened.move_to_end(name)
        ends, content = self._opened[name]
        start = int(ends[place - 1]) if place else 0
        return unpacked(content[start : ends[place]].tobytes()) if ends[place] > start else None
