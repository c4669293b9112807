"""The components of a pool: what is a copy of what, and what reference images are near."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2.curate.dedup.components import Components
from dinov2.curate.dedup.components_reference import Labels
from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.pool import Pool
from dinov2.curate.search import Layout, Neighbours
from dinov2.curate.search.vectors import PoolVectors
from dinov2.curate.steps import Counts, Output

PART = 50_000  # members whose vectors are compared by one task


@dataclass(frozen=True)
class Reference:
    """Images that must not be in the pool.

    Attributes:
        name: of the set.
        pool: its images, with features.
        links: the nearest of them to each image of the pool, where one is near enough.
    """

    name: str
    pool: Pool
    links: Neighbours


def part_name(number: int) -> str:
    """Of the tables of one part of all members."""
    return f"part-{number:05d}"


def find_components(
    output: Output, pool: Pool, neighbours: Neighbours, references: tuple[Reference, ...], config: DedupConfig
) -> Counts:
    """Task: components of the whole pool, in one pass over the links with 4 bytes a row; 8 for a ``reference_reach``.

    For each shard a table ``all.SHARD.parquet`` with a row for each of its rows:

    - component, int64: the lowest position of its component;
    - reference, int16: number of the reference set for which the component is dropped, -1 where it is not;
    - reference_position, int64: of the reference image nearest to any of the component.

    Of all members of components that are not dropped, by component and then from the best down, tables
    ``all.part-NUMBER.parquet`` of :data:`PART` members each: position, component, best (position of the best).
    """
    layout = neighbours.layout()
    labels = _components(layout, neighbours, config.threshold).labels()
    reach = labels
    if references and config.reference_reach != config.threshold:
        reach = _components(layout, neighbours, config.reference_reach).labels()
    nearest = _nearest_references(layout, references, reach)
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
    """Components that are linked to a reference image, by label, and which one is nearest to any of their images."""

    label: npt.NDArray[np.int64]  # [C], sorted
    reference: npt.NDArray[np.int16]  # [C]
    position: npt.NDArray[np.int64]  # [C]

    def of(self, labels: Labels) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """The reference set and the position in it for labels [N]; -1 where there is none."""
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


def _nearest_references(layout: Layout, references: tuple[Reference, ...], reach: Labels) -> _Nearest:
    """For each component with links to reference images that of the largest cosine; of equal ones the first."""
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
