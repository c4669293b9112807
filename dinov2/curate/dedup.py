"""The dedup stage keeps one image of each group of near-copies, and drops images that are near an evaluation image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dinov2.configuration import Config, Cosine, Count, to_json
from dinov2.curate.pool import Pool, read_table, write_decisions
from dinov2.curate.search import Layout, Neighbours, SearchConfig, exact_cosines, pair_cosines, search
from dinov2.curate.search.vectors import CHUNK, PoolVectors, Positions, Vectors, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, check_names
from dinov2.extras import require

if TYPE_CHECKING:
    from dinov2.curate.components import Components, Labels

PART = 50_000  # members whose vectors are compared by one task
DUPLICATE = "duplicate"
NEAR_REFERENCE = "near an evaluation image"
NO_FEATURES = "no features to compare"


@dataclass(frozen=True, kw_only=True)
class DedupConfig(Config, at="dedup"):
    """These settings decide which images are copies. Two images are linked if their cosine exceeds a threshold."""

    neighbours: Count = 64
    """An image is linked to at most this many nearest neighbours."""
    threshold: Cosine = 0.6
    """Two images of the pool are linked above this cosine. Linked images form a component, and one of them is kept."""
    guard_threshold: Cosine = 0.6
    """A member of a component is dropped only if its cosine to the kept image is above this. Other members are copies
    of copies: the best of them is kept too, for those near it, and so on. -1 keeps one image of each component."""
    guard_rounds: Count = 8
    """A component keeps at most this many images in this way; after that, all its other members are kept unseen."""
    reference_threshold: Cosine = 0.45
    """An image of the pool is linked to a reference image above this cosine."""
    reference_reach: Cosine = 0.6
    """Images of the pool are also linked above this cosine to find what is near a reference image: if one member of a
    component is linked to a reference image, all its members are dropped."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """This is how neighbours are found."""


def dedup(pool: Pool, references: Mapping[str, Pool], config: DedupConfig, output: str) -> Steps[Pool]:
    """Keep one image of each group of near-copies, and none that is near a reference image (appendix A of DINOv2).

    Each image is linked to its nearest neighbours above a threshold. Images connected by links form a component. A
    component that is linked to a reference image is dropped as a whole. Each other component keeps its largest image;
    among equals, the first. A guard finds the members that are unlike the kept image; of these the largest is kept too,
    and so on. Images without features cannot be compared, so they are dropped.

    Args:
        pool: images with features.
        references: pools of evaluation images by name, with features of the same kind.
        config: thresholds, and how neighbours are found.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions; :func:`~dinov2.curate.dedup.decide` says what the tables hold.

    Raises:
        ValueError: a pool has no features, or a name is not made of letters, digits, ``_`` and ``-``.
    """
    check_names("references", references)
    threshold = min(config.threshold, config.reference_reach) if references else config.threshold
    neighbours = yield from search(
        pool, pool, config.search, output, stage="dedup", k=config.neighbours, threshold=threshold
    )
    linked = []
    for name, reference in sorted(references.items()):
        links = yield from search(
            pool, reference, config.search, output, stage=f"dedup-{name}", k=1, threshold=config.reference_threshold
        )
        linked.append(Reference(name, reference, links))
    decisions = yield from _decide(pool, neighbours, tuple(linked), config, output)
    return pool.after(decisions)


def _decide(
    pool: Pool, neighbours: Neighbours, references: tuple[Reference, ...], config: DedupConfig, output: str
) -> Steps[str]:
    """Steps from links to decisions; the value is the folder of the decisions."""
    layout = neighbours.searched
    settings = {name: value for name, value in to_json(config).items() if name != "search"}
    settings["references"] = [reference.name for reference in references]
    inputs = (layout, neighbours.folder, *(reference.links.folder for reference in references))

    task = Task("all", find_components, (pool, neighbours, references, config))
    components = Step(output, "dedup-components", settings, inputs, (task,))
    yield components
    parts = tuple(part_name(number) for number in range(components.counts().figures["parts"]))

    tasks = tuple(Task(part, choose, (pool, layout, components.folder, part, config)) for part in parts)
    choices = Step(output, "dedup-choices", settings, (components.folder,), tasks, "members of components")
    yield choices

    task = Task("all", assign, (layout, choices.folder, parts))
    chosen = Step(output, "dedup-representatives", None, (choices.folder,), (task,), "members of components")
    yield chosen

    shards = read_layout(layout).names
    tasks = tuple(Task(name, decide, (pool, layout, components.folder, chosen.folder, references)) for name in shards)
    decisions = Step(output, "dedup-decisions", settings, (components.folder, chosen.folder), tasks)
    yield decisions
    return decisions.folder


@dataclass(frozen=True)
class Reference:
    """Images that must not be in the pool.

    Attributes:
        name: name of the set.
        pool: images of the set, with features.
        links: for each image of the curated pool, the nearest image of the set, if one is near enough.
    """

    name: str
    pool: Pool
    links: Neighbours


def part_name(number: int) -> str:
    """The name of the tables of one part of all members."""
    return f"part-{number:05d}"


def find_components(
    output: Output, pool: Pool, neighbours: Neighbours, references: tuple[Reference, ...], config: DedupConfig
) -> Counts:
    """Task: find the components of the whole pool, in one pass over the links.

    This takes 4 bytes a row, or 8 if there is a ``reference_reach``.

    For each shard it writes a table ``all.SHARD.parquet`` with one row for each row of the shard:

    - component, int64: lowest position of the row's component;
    - reference, int16: number of the reference set for which the component is dropped, -1 if it is not dropped;
    - reference_position, int64: position of the reference image that is nearest to any image of the component.

    It also writes tables ``all.part-NUMBER.parquet``, each of :data:`PART` members of components that are not dropped,
    sorted by component and then from the best image down: position, component, best (position of the best image).
    """
    layout = neighbours.layout()
    labels = _components(layout, neighbours, config.threshold).labels()
    reach = labels
    if references and config.reference_reach != config.threshold:
        reach = _components(layout, neighbours, config.reference_reach).labels()
    nearest = _references_of_components(layout, references, reach)
    is_member = _is_member(labels)
    members = np.flatnonzero(is_member)  # [M]
    if len(nearest.label):
        members = members[~np.isin(reach[members], nearest.label)]
    components = labels[members].astype(np.int64)
    order = np.lexsort((members, -_areas(pool, layout, members), components))
    members, components = members[order], components[order]
    starts = np.flatnonzero(np.diff(components, prepend=-1))  # [C] where each component begins
    best = np.repeat(members[starts], np.diff(starts, append=len(members)))
    parts = range(0, len(members), PART)
    for number, start in enumerate(parts):
        rows = slice(start, start + PART)
        columns = {"position": members[rows], "component": components[rows], "best": best[rows]}
        Output(output.folder, f"{output.shard}.{part_name(number)}").write_table(columns)
    for shard in layout.names:
        rows = slice(*layout.range_of(shard))
        sets, positions = nearest.of(reach[rows])
        component = labels[rows].astype(np.int64)
        Output(output.folder, f"{output.shard}.{shard}").write_table(
            {"component": component, "reference": sets, "reference_position": positions}
        )
    figures = {"components": len(starts), "members": len(members), "parts": len(parts)}
    if unseen := sum(PoolVectors(of.pool, of.links.layout()).missing() for of in references):
        figures["reference images without features, not looked for"] = unseen
    return Counts(layout.rows, layout.rows, {}, figures)


@dataclass(frozen=True)
class _Nearest:
    """Components that are linked to a reference image, and for each the nearest reference image."""

    label: npt.NDArray[np.int64]  # [C], sorted
    reference: npt.NDArray[np.int16]  # [C]
    position: npt.NDArray[np.int64]  # [C]

    def of(self, labels: Labels) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """The reference set and the position in it for labels [N]; -1 for components without a reference."""
        if not len(self.label):
            return np.full(len(labels), -1, np.int16), np.full(len(labels), -1, np.int64)
        slot = np.minimum(np.searchsorted(self.label, labels), len(self.label) - 1)
        found = self.label[slot] == labels
        return (
            np.where(found, self.reference[slot], -1).astype(np.int16),
            np.where(found, self.position[slot], -1),
        )


def _components(layout: Layout, neighbours: Neighbours, threshold: float) -> Components:
    """The components of the links above a threshold."""
    from dinov2.curate.components import Components

    components = Components(layout.rows)
    for first, second in _links(layout, neighbours, threshold):
        components.join(first, second)
    return components


def _links(
    layout: Layout, neighbours: Neighbours, threshold: float
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    for shard in layout.names:
        found = neighbours.read(shard)
        above = found.cosine > np.float32(threshold)
        yield found.row[above] + layout.range_of(shard)[0], found.neighbour[above]


def _references_of_components(layout: Layout, references: tuple[Reference, ...], reach: Labels) -> _Nearest:
    """For each component with links to reference images, the one with the largest cosine; among equals, the first."""
    labels, numbers, positions, cosines = [], [], [], []
    for number, reference in enumerate(references):
        for shard in layout.names:
            found = reference.links.read(shard)
            labels.append(reach[found.row + layout.range_of(shard)[0]].astype(np.int64))
            numbers.append(np.full(len(found.row), number, np.int16))
            positions.append(found.neighbour)
            cosines.append(found.cosine)
    if not labels:
        return _Nearest(np.zeros(0, np.int64), np.zeros(0, np.int16), np.zeros(0, np.int64))
    label, numbered = np.concatenate(labels), np.concatenate(numbers)  # [L] each
    position, cosine = np.concatenate(positions), np.concatenate(cosines)
    order = np.lexsort((position, numbered, -cosine, label))
    order = order[np.diff(label[order], prepend=-1) != 0]
    return _Nearest(label[order], numbered[order], position[order])


def _is_member(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which nodes share their component with another."""
    below = labels != np.arange(len(labels), dtype=labels.dtype)
    member: npt.NDArray[np.bool_] = below.copy()
    member[labels[below]] = True
    return member


def _areas(pool: Pool, layout: Layout, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Areas in pixels of the images at ascending positions [M]."""
    areas = np.zeros(len(positions), np.int64)
    for shard in layout.names:
        start, stop = layout.range_of(shard)
        here = slice(*np.searchsorted(positions, [start, stop]))
        if here.start < here.stop:
            index = pool.index(shard, ["width", "height"])
            area = index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy()
            areas[here] = area[positions[here] - start]
    return areas


def choose(output: Output, pool: Pool, layout_folder: str, components: str, part: str, config: DedupConfig) -> Counts:
    """Task: choose a representative for each member of a part of all components.

    The best image of a component has the largest area; among equals, the lowest position. It represents all members
    whose cosine to it is above the guard's threshold. In the next round, the best of the other members in this part
    represents those above the threshold, and so on. After the last round the rest represent themselves.

    It writes position, representative (a position; a kept row has its own), the cosine to it, and guard_rejected
    (bool): whether the member was too far from the best image of its component.
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
