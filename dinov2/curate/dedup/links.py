"""The check of links: of the candidates that features have found, those stay that show the same picture.

The neighbours of all rows become a list of pairs, each once. Tasks compare portions of it by the images' sketches. Then
the pairs that show the same picture are sorted by shard again, and take the place of the neighbours.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from dinov2.curate.copies import Comparison, Sketch, compare, is_plain
from dinov2.curate.copies.sketches import Reader, open_sketches
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.search import Layout, Neighbours
from dinov2.curate.search.neighbours import Found
from dinov2.curate.steps import Counts, Output, Step, Steps, Task

PORTION = 2000
"""Pairs that a task compares: a few seconds of work."""
CODE = 3
"""Number that is raised when the comparison changes, so that old results are not taken for new ones."""

Positions = npt.NDArray[np.int64]


def checked_links(
    neighbours: Neighbours, pool: Pool, others: Pool, output: str, stage: str, plain_threshold: float = 1.0
) -> Steps[Neighbours]:
    """Keep those links whose two images show the same picture.

    Args:
        neighbours: neighbours of the pool's rows.
        pool: pool of the queries, with sketches.
        others: pool that was searched, with sketches. If it is the same pool, a pair that is linked both ways is
            compared once.
        output: folder or URL of the whole curation.
        stage: first part of the steps' names.
        plain_threshold: links above this cosine also stay if one of the images is too plain to be compared.

    Returns:
        The neighbours without the other links.
    """
    inputs = (neighbours.folder, neighbours.queries, neighbours.searched)
    listed = Step(output, f"{stage}-pairs-listed", PORTION, inputs, [Task("all", _list, (neighbours,))], "pairs")
    yield listed
    pairs, tasks = listed.counts().rows_out, []
    for number, start in enumerate(range(0, pairs, PORTION)):
        stop = min(start + PORTION, pairs)
        arguments = (listed.folder, start, stop, pool, others, neighbours)
        tasks.append(Task(f"part-{number:05d}", _compare, arguments, stop - start))
    sketches = [pool.sketches for pool in (pool, others) if pool.sketches is not None]
    comparisons = Step(output, f"{stage}-compared", CODE, (listed.folder, *sketches), tasks, "pairs")
    yield comparisons
    parts = tuple(task.shard for task in tasks)
    task = Task("all", _select, (neighbours, listed.folder, comparisons.folder, parts, plain_threshold))
    links = Step(output, f"{stage}-links", plain_threshold, (listed.folder, comparisons.folder), [task], "links")
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
    own = open_sketches(pool)
    other = own if pool == others else open_sketches(others)
    layouts = neighbours.query_layout(), neighbours.layout()
    fits, plain = list[Comparison](), list[bool]()
    for first, second in zip(table["first"].to_pylist(), table["second"].to_pylist(), strict=True):
        pair = sketch_at(own, layouts[0], first), sketch_at(other, layouts[1], second)
        fits.append(compared(*pair))
        plain.append(any(one is not None and is_plain(one) for one in pair))
        output.advance(1)
    columns = [np.array([fit[number] for fit in fits]) for number in range(len(Comparison._fields))]
    output.write_table(dict(zip(Comparison._fields, columns, strict=True)) | {"plain": np.array(plain, bool)})
    same = sum(fit.same for fit in fits)
    return Counts(len(fits), same, {"other pictures": len(fits) - same})


def _select(
    output: Output,
    neighbours: Neighbours,
    listed: str,
    comparisons: str,
    parts: tuple[str, ...],
    plain_threshold: float,
) -> Counts:
    """Task: write the links of each shard whose images show the same picture, as ``SHARD.parquet``."""
    rows = neighbours.layout().rows
    pairs = read_table(listed, "all")
    numbers = pairs["first"].to_numpy() * rows + pairs["second"].to_numpy()  # ascending, because the pairs are sorted
    tables = [read_table(comparisons, part, ["same", "plain"]) for part in parts]
    same, plain = (
        np.concatenate([np.zeros(0, bool), *(table[name].to_numpy() for table in tables)]) for name in ("same", "plain")
    )
    counts = Counts()
    for shard in neighbours.query_layout().names:
        found, own = neighbours.read(shard), _pairs(neighbours, shard)
        place = np.searchsorted(numbers, own[:, 0] * rows + own[:, 1])
        stays: npt.NDArray[np.bool_] = same[place] | (plain[place] & (found.cosine > np.float32(plain_threshold)))
        links = Found(found.row[stays], found.neighbour[stays], found.cosine[stays])
        Output(output.folder, shard).write_table(links._asdict())
        counts += Counts(len(stays), int(stays.sum()))
    return counts


def compared(first: Sketch | None, second: Sketch | None) -> Comparison:
    """Compare two images. One that could not be read shows nothing."""
    return Comparison() if first is None or second is None else compare(first, second)


def sketch_at(sketches: Reader, layout: Layout, position: int) -> Sketch | None:
    """The sketch of the image at a position; None if it could not be read."""
    numbers, rows = layout.locate(np.array([position]))
    return sketches(layout.names[int(numbers[0])], int(rows[0]))
