"""The check of links: of the candidates that features have found, those stay that show the same picture.

The neighbours of all rows become a list of pairs, each once. Tasks compare a portion of it. Then the pairs that show
the same picture are sorted by shard again, so that they can take the place of the neighbours.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from dinov2.curate.copies import Comparison, Sketch, compare, sketch
from dinov2.curate.copies.points import SIDE
from dinov2.curate.pool import Pool, ShardBytes, read_table
from dinov2.curate.search import Layout, Neighbours
from dinov2.curate.search.neighbours import Found
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.decoding import UnreadableImageError, decode_reduced

PORTION = 1000
"""Pairs that a task compares: a few seconds of work."""
REMEMBERED = 500
"""Sketches that a task remembers, of half a megabyte each."""

Positions = npt.NDArray[np.int64]


def checked_links(neighbours: Neighbours, pool: Pool, others: Pool, output: str, stage: str) -> Steps[Neighbours]:
    """Keep those links whose two images show the same picture.

    Args:
        neighbours: neighbours of the pool's rows.
        pool: pool of the queries.
        others: pool that was searched; if it is the same, a pair that is linked both ways is compared once.
        output: folder or URL of the whole curation.
        stage: first part of the steps' names.

    Returns:
        The neighbours without the other links.
    """
    inputs = (neighbours.folder, neighbours.queries, neighbours.searched, pool.images, others.images)
    listed = Step(output, f"{stage}-pairs-listed", PORTION, inputs, [Task("all", _list, (neighbours,))], "pairs")
    yield listed
    pairs, tasks = listed.counts().rows_out, []
    for number, start in enumerate(range(0, pairs, PORTION)):
        stop = min(start + PORTION, pairs)
        arguments = (listed.folder, start, stop, pool, others, neighbours)
        tasks.append(Task(f"part-{number:05d}", _compare, arguments, stop - start))
    compared = Step(output, f"{stage}-compared", None, (listed.folder, *inputs), tasks, "pairs")
    yield compared
    task = Task("all", _select, (neighbours, listed.folder, compared.folder, tuple(task.shard for task in tasks)))
    links = Step(output, f"{stage}-links", None, (listed.folder, compared.folder), [task], "links")
    yield links
    return dataclasses.replace(neighbours, folder=links.folder)


def _list(output: Output, neighbours: Neighbours) -> Counts:
    """Task: write every pair of neighbours once, as columns ``first`` and ``second`` (positions), sorted."""
    links = [_pairs(neighbours, shard) for shard in neighbours.query_layout().names]
    pairs = np.unique(np.concatenate([np.zeros((0, 2), np.int64), *links]), axis=0)
    output.write_table({"first": pairs[:, 0], "second": pairs[:, 1]})
    return Counts(sum(map(len, links)), len(pairs))


def _pairs(neighbours: Neighbours, shard: str) -> Positions:
    """The links [n, 2] of a shard's rows. Within one pool, the lower position comes first."""
    found = neighbours.read(shard)
    start, _ = neighbours.query_layout().range_of(shard)
    pairs = np.stack([found.row + start, found.neighbour], axis=1)
    return np.sort(pairs, axis=1) if neighbours.queries == neighbours.searched else pairs


def _compare(
    output: Output, folder: str, start: int, stop: int, pool: Pool, others: Pool, neighbours: Neighbours
) -> Counts:
    """Task: compare pairs ``start`` to ``stop`` and write the columns of :class:`Comparison`."""
    table = read_table(folder, "all").slice(start, stop - start)
    own = Sketches(pool, neighbours.query_layout())
    other = own if neighbours.queries == neighbours.searched else Sketches(others, neighbours.layout())
    fits = []
    for first, second in zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True):
        fits.append(own.compare(first, other, second))
        output.advance(1)
    columns = [np.array([fit[number] for fit in fits]) for number in range(len(Comparison._fields))]
    output.write_table(dict(zip(Comparison._fields, columns, strict=True)))
    same = sum(fit.same for fit in fits)
    return Counts(len(fits), same, {"other pictures": len(fits) - same})


def _select(output: Output, neighbours: Neighbours, listed: str, compared: str, parts: tuple[str, ...]) -> Counts:
    """Task: write the links of each shard whose images show the same picture, as ``SHARD.parquet``."""
    pairs = read_table(listed, "all")
    same = np.concatenate([np.zeros(0, bool), *(read_table(compared, part, ["same"])["same"] for part in parts)])
    first, second = pairs["first"].to_numpy()[same], pairs["second"].to_numpy()[same]
    kept = set(zip(first.tolist(), second.tolist(), strict=True))
    counts = Counts()
    for shard in neighbours.query_layout().names:
        found, own = neighbours.read(shard), _pairs(neighbours, shard)
        stays = np.array([pair in kept for pair in map(tuple, own.tolist())], bool)
        links = Found(*(column[stays] for column in found))
        Output(output.folder, shard).write_table(links._asdict())
        counts += Counts(len(stays), int(stays.sum()))
    return counts


class Sketches:
    """Sketches of the images of a pool by position. The last ones are remembered.

    Args:
        pool: images.
        layout: positions of the pool's rows.
    """

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self._pool = pool
        self._layout = layout
        self._files: dict[str, ShardBytes] = {}
        self._remembered: OrderedDict[int, Sketch | None] = OrderedDict()

    def compare(self, position: int, others: Sketches, other: int) -> Comparison:
        """Compare an image with an image of another pool. One that cannot be read shows nothing."""
        first, second = self[position], others[other]
        return Comparison() if first is None or second is None else compare(first, second)

    def __getitem__(self, position: int) -> Sketch | None:
        """The sketch of an image; None if it cannot be read."""
        if position not in self._remembered:
            self._remembered[position] = self._sketched(position)
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(position)
        return self._remembered[position]

    def _sketched(self, position: int) -> Sketch | None:
        numbers, rows = self._layout.locate(np.array([position]))
        shard, row = self._layout.names[int(numbers[0])], int(rows[0])
        if shard not in self._files:
            self._files[shard] = self._pool.open_images(shard)
        try:
            return sketch(decode_reduced(self._files[shard][row], f"{row} of {shard}", SIDE).pixels)
        except UnreadableImageError:
            return None
