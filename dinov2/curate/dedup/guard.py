"""Who stands for whom: members of a component are compared with the one that would be kept, exactly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.search import Layout, exact_cosines
from dinov2.curate.search.layout import read_layout
from dinov2.curate.search.vectors import CHUNK, PoolVectors
from dinov2.curate.steps import Counts, Output


def choose(output: Output, pool: Pool, layout_folder: str, components: str, part: str, config: DedupConfig) -> Counts:
    """Task: a representative for each member of a part of all components.

    The best image of a component, the one with the largest area and of equal ones that of the lowest position, stands
    for all members whose cosine to it is above the guard's threshold. Of the others of that component in this part the
    best stands for those above the threshold, and so on; after the last round the rest stand for themselves.

    Writes position, representative (position; the row's own where it is kept), cosine to it, and guard_rejected (bool):
    the member was too far from the best of its component.
    """
    table = read_table(components, f"all.{part}")
    position, component, best = (table[name].to_numpy() for name in ("position", "component", "best"))
    vectors = PoolVectors(pool, read_layout(layout_folder))
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
        near = (cosines > np.float32(config.guard_threshold)) | (stands == position[remaining])
        near |= config.guard_threshold <= -1
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
    """Task: the same by shard, tables ``all.SHARD.parquet`` with row instead of position, ordered by row."""
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
    """Exact cosines of ``members[rows]`` with the features at ``positions``, of which many are the same."""
    distinct, slot = np.unique(positions, return_inverse=True)
    others = vectors.gather(distinct)
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        cosines[chunk] = exact_cosines(members[rows[chunk]], others[slot[chunk]])
    return cosines
