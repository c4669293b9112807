"""Tasks of deduplication: from links between images to components, and to the reference images that they are near."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.pool import Pool
from dinov2.curate.search import Layout, Neighbours
from dinov2.curate.search.vectors import PoolVectors
from dinov2.curate.steps import Counts, Output

if TYPE_CHECKING:
    from dinov2.curate.components import Components, Labels

PART = 50_000  # members whose vectors are compared by one task
ANY = -2.0  # threshold of links that were checked: all count
PART_OF_PICTURES = 500  # members whose pictures are compared by one task


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

    It also writes tables ``all.part-NUMBER.parquet``, each with some members of components that are not dropped,
    sorted by component and then from the best image down: position, component, best (position of the best image).
    """
    layout = neighbours.layout()
    checks = config.checks_pictures
    labels = _components(layout, neighbours, ANY if checks else config.threshold).labels()
    reach = labels
    if references and not checks and config.reference_reach != config.threshold:
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
    part = PART_OF_PICTURES if checks else PART
    parts = range(0, len(members), part)
    for number, start in enumerate(parts):
        rows = slice(start, start + part)
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
