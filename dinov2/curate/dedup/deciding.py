"""The last task of deduplication: which rows of a shard are kept, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.curate.dedup.grouping import Reference
from dinov2.curate.pool import Pool, read_table, write_decisions
from dinov2.curate.search import Layout, pair_cosines
from dinov2.curate.search.vectors import PoolVectors, Positions, Vectors, read_layout
from dinov2.curate.steps import Counts, Output
from dinov2.extras import require

DUPLICATE = "duplicate"
NEAR_REFERENCE = "near an evaluation image"
NO_FEATURES = "no features to compare"


def decide(
    output: Output, pool: Pool, layout_folder: str, components: str, chosen: str, references: tuple[Reference, ...]
) -> Counts:
    """Task: decide which rows of a shard are kept.

    The table has keep, reason and these columns, which are null if they do not apply:

    - component, int64: position of the first image of the row's component;
    - representative_shard, representative_row, representative_cosine: the image that is kept for this one, or itself;
      only for members of components of two or more images;
    - guard_rejected, bool: whether the row is too far from the best image of its component to be dropped for it;
    - reference, reference_shard, reference_row, reference_cosine: set and place of the reference image for which this
      row is dropped, and their cosine. If the cosine is not above the threshold, the reference image is near another
      image of the component.
    """
    layout, shard = read_layout(layout_folder), output.shard
    start, stop = layout.range_of(shard)
    before = pool.kept(shard)
    vectors, present = PoolVectors(pool, layout).block(start, stop)
    rows = present - start  # [N] rows that are in and have features

    found = read_table(components, f"all.{shard}")
    members = read_table(chosen, f"all.{shard}")
    member, representative = members["row"].to_numpy(), members["representative"].to_numpy()
    sets, places = _references_of_rows(found, references, shard)
    near = rows[sets[rows] >= 0]

    reasons = np.full(stop - start, NO_FEATURES, object)
    reasons[rows] = None
    reasons[member[representative != member + start]] = DUPLICATE
    reasons[near] = NEAR_REFERENCE
    size = stop - start
    rejected = members["guard_rejected"].to_numpy()
    columns = {
        "component": _column(size, rows, found["component"].to_numpy()[rows]),
        **_place("representative", size, member, layout, representative),
        "representative_cosine": _column(size, member, members["cosine"].to_numpy()),
        "guard_rejected": _column(size, member, rejected),
        **_reference_columns(size, near, sets[near], places[near], references, vectors, rows),
    }
    figures = {"in components of two or more": len(member), "rejected by the guard": int(rejected.sum())}
    return write_decisions(output, reasons.tolist(), before, columns, figures)


def _references_of_rows(
    found: Any, references: Sequence[Reference], shard: str
) -> tuple[npt.NDArray[np.int16], Positions]:
    """Set number and position of each row's reference image: by its own link, else by its component's, else -1."""
    sets, places = found["reference"].to_numpy().copy(), found["reference_position"].to_numpy().copy()
    cosines = np.full(len(sets), -2, np.float32)
    for number, reference in enumerate(references):
        row, position, cosine = reference.links.read(shard)
        nearer = cosine > cosines[row]
        row = row[nearer]
        sets[row], places[row], cosines[row] = number, position[nearer], cosine[nearer]
    return sets, places


def _reference_columns(
    size: int,
    near: Positions,
    sets: npt.NDArray[np.int16],
    places: Positions,
    references: Sequence[Reference],
    vectors: Vectors,
    rows: Positions,
) -> dict[str, Any]:
    """Reference columns of the rows ``near`` [M], which are among the rows [N] with vectors [N, D]."""
    names, shards = np.full(len(near), None, object), np.full(len(near), None, object)
    reference_rows, cosines = np.zeros(len(near), np.int64), np.zeros(len(near), np.float32)
    for number, reference in enumerate(references):
        here = np.flatnonzero(sets == number)
        layout = reference.links.layout()
        numbers, reference_rows[here] = layout.locate(places[here])
        names[here] = reference.name
        shards[here] = np.asarray(layout.names, object)[numbers]
        slots = np.searchsorted(rows, near[here])
        cosines[here] = pair_cosines(vectors, slots, PoolVectors(reference.pool, layout), places[here])
    return {
        "reference": _column(size, near, names),
        "reference_shard": _column(size, near, shards),
        "reference_row": _column(size, near, reference_rows),
        "reference_cosine": _column(size, near, cosines),
    }


def _place(name: str, size: int, rows: Positions, layout: Layout, positions: Positions) -> dict[str, Any]:
    """Columns with the shard and row of positions [M], at the rows [M]."""
    numbers, places = layout.locate(positions)
    shards = np.asarray(layout.names, object)[numbers]
    return {f"{name}_shard": _column(size, rows, shards), f"{name}_row": _column(size, rows, places)}


def _column(size: int, rows: Positions, values: npt.NDArray[Any]) -> Any:
    """An Arrow array [size] with values [M] at the rows [M] and null at the others."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    dense, absent = np.zeros(size, values.dtype), np.ones(size, bool)
    dense[rows], absent[rows] = values, False
    return arrow.array(dense, arrow.string() if values.dtype == object else None, mask=absent)
