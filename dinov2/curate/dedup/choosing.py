"""Tasks of deduplication: which image of a component represents which of its other members."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.curate.copies.sketches import Reader, open_sketches
from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.dedup.links import compared, sketch_at
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.search import Layout, exact_cosines
from dinov2.curate.search.vectors import CHUNK, PoolVectors, read_layout
from dinov2.curate.steps import Counts, Output


def choose(
    output: Output,
    pool: Pool,
    layout_folder: str,
    components: str,
    part: str,
    config: DedupConfig,
) -> Counts:
    """Task: choose a representative for each member of a part of all components.

    The best image of a component has the largest area; among equals, the lowest position. It represents all members
    whose cosine to it is above the guard's threshold, or, if pictures are checked, which show the same picture. In the
    next round, the best of the other members in this part represents those near it, and so on. After the last round the
    rest represent themselves.

    It writes position, representative (a position; a kept row has its own), the cosine to it, and guard_rejected
    (bool): whether the member was too far from the best image of its component.
    """
    table = read_table(components, f"all.{part}")
    position, component, best = (table[name].to_numpy() for name in ("position", "component", "best"))
    layout = read_layout(layout_folder)
    vectors = PoolVectors(pool, layout)
    sketches = open_sketches(pool) if config.checks_pictures else None
    members = vectors.gather(position)  # [M, D]
    representative, cosine = position.copy(), np.ones(len(position), np.float32)
    remaining = np.arange(len(position))
    rejected = np.zeros(len(position), bool)
    for number in range(config.guard_rounds):
        if number == 0:
            stands = best
        else:
            first = np.searchsorted(component[remaining], component[remaining], side="left")
            stands = position[remaining[first]]
        cosines = _cosines(members, remaining, vectors, stands)
        if sketches is not None:
            near = _same(sketches, layout, position[remaining], stands)
        else:
            near = (cosines > np.float32(config.guard_threshold)) | (config.guard_threshold <= -1)
        near |= stands == position[remaining]
        representative[remaining[near]] = stands[near]
        cosine[remaining[near]] = cosines[near]
        remaining = remaining[~near]
        if number == 0:
            rejected[remaining] = True
        if not len(remaining):
            break
    columns = {"position": position, "representative": representative, "cosine": cosine, "guard_rejected": rejected}
    output.write_table(columns)
    kept = int((representative == position).sum())
    checked = int((best != position).sum())
    figures = {"checked by the guard": checked, "rejected by the guard": int(rejected.sum())}
    return Counts(len(position), kept, {"duplicate": len(position) - kept}, figures)


def assign(output: Output, layout_folder: str, chosen: str, parts: tuple[str, ...]) -> Counts:
    """Task: sort the results of ``choose`` by shard, into tables ``all.SHARD.parquet`` with row instead of position."""
    tables = [read_table(chosen, part) for part in parts]
    names = ("position", "representative", "cosine", "guard_rejected")
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool))
    columns = {
        name: np.concatenate([nothing, *(table[name].to_numpy() for table in tables)])
        for name, nothing in zip(names, empty, strict=True)
    }
    order = np.argsort(columns["position"])
    columns = {name: column[order] for name, column in columns.items()}
    layout: Layout = read_layout(layout_folder)
    for shard in layout.names:
        start, stop = layout.range_of(shard)
        here = slice(*np.searchsorted(columns["position"], [start, stop]))
        of_shard = {name: column[here] for name, column in columns.items()}
        of_shard["row"] = of_shard.pop("position") - start
        Output(output.folder, f"{output.shard}.{shard}").write_table(of_shard)
    return Counts(len(order), len(order))


def _cosines(
    members: npt.NDArray[np.float16],
    rows: npt.NDArray[np.int64],
    vectors: PoolVectors,
    positions: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Exact cosines of ``members[rows]`` with the features at ``positions``; many positions repeat."""
    distinct, slot = np.unique(positions, return_inverse=True)
    others = vectors.gather(distinct)
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        cosines[chunk] = exact_cosines(members[rows[chunk]], others[slot[chunk]])
    return cosines


def _same(
    sketches: Reader, layout: Layout, positions: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which images [n] show the same picture as the others [n]."""
    return np.array(
        [
            one == other or compared(sketch_at(sketches, layout, one), sketch_at(sketches, layout, other)).same
            for one, other in zip(positions.tolist(), others.tolist(), strict=True)
        ]
    )
