"""Where the images of one shard of the final set lie, and what their own shards say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.pool import Pool, read_table
from dinov2.curate.screen.faces import Box
from dinov2.curate.search.layout import read_layout
from dinov2.data.shards.rows import COLUMNS
from dinov2.data.shards.storage import RangeReader, Storage

COLUMNS_OF_STAGES = ("component", "cluster", "times", "seed_set")
"""Columns of decisions that go into the final index, where there are any."""

Source = tuple[str, Pool, str]
"""Name of a set, its images, and the folder of their layout."""


class Planned(NamedTuple):
    """An image that is to be written.

    Attributes:
        content: its file, shorter where the tar is cut off.
        columns: for the index.
        faces: that were found in it.
    """

    content: bytes
    columns: dict[str, Any]
    faces: list[Box]


class _Place(NamedTuple):
    path: str
    offset: int
    size: int
    columns: dict[str, Any]


def read_images(sources: tuple[Source, ...], entries: npt.NDArray[np.int64]) -> Iterator[Planned]:
    """The images of ``entries``, [N, 2] int64: number of the source and position in it, in that order.

    What shards say is read first, of one shard at a time and kept of the images alone, so that memory grows with N and
    not with how many shards these come from; files are then read one by one, each source's through one reader.
    """
    places: dict[tuple[int, int], _Place] = {}
    readers = {}
    for number in np.unique(entries[:, 0]).tolist():
        name, pool, layout = sources[number]
        readers[number] = RangeReader(Storage(pool.images).filesystem)
        found = _places(name, pool, layout, np.sort(entries[entries[:, 0] == number, 1]))
        places |= {(number, position): place for position, place in found}
    for number, position in entries.tolist():
        place = places.pop((number, position))
        faces = [Box(**box) for box in place.columns.pop("faces", None) or []]
        yield Planned(readers[number](place.path, place.offset, place.size), place.columns, faces)


def _places(name: str, pool: Pool, folder: str, positions: npt.NDArray[np.int64]) -> Iterator[tuple[int, _Place]]:
    """Of ascending positions [N]."""
    layout, tars = read_layout(folder), Storage(pool.images).shards()
    numbers, rows = layout.locate(positions)
    computed = COLUMNS.keys() - {"url"}
    for number in np.unique(numbers).tolist():
        shard, here = layout.names[number], numbers == number
        index = pool.index(shard).take(rows[here])
        columns = {column: index[column].to_pylist() for column in index.column_names if column not in computed}
        for decisions in pool.decisions:
            table = read_table(decisions, shard).take(rows[here])
            for column in {*COLUMNS_OF_STAGES, "faces"} & {*table.column_names}:
                columns[column] = table[column].to_pylist()
        columns["source"] = [f"{name}/{shard}" if name else shard] * int(here.sum())
        offsets, sizes = index["offset"].to_pylist(), index["size"].to_pylist()
        for i, position in enumerate(positions[here].tolist()):
            own = {column: values[i] for column, values in columns.items()}
            yield position, _Place(tars[shard], offsets[i], sizes[i], own)
