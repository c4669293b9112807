"""From the neighbours of seeds to the images that were found."""

from __future__ import annotations

import numpy as np

from dinov2.curate.search import Neighbours
from dinov2.curate.steps import Counts, Output
from dinov2_kernels._extras import require


def write_hits(output: Output, found: Neighbours) -> Counts:
    """Task: write for every image that was found its ``position``, ``times``, and its nearest ``seed`` (position in its
    set, of equally near ones the first) with ``cosine``; ordered by position."""
    layout = found.query_layout()
    seeds, positions, cosines = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for shard in layout.names:
        part = found.read(shard)
        seeds.append(part.row + layout.range_of(shard)[0])
        positions.append(part.neighbour)
        cosines.append(part.cosine)
    seed, position, cosine = np.concatenate(seeds), np.concatenate(positions), np.concatenate(cosines)
    order = np.lexsort((seed, -cosine, position))
    once, first, times = np.unique(position[order], return_index=True, return_counts=True)
    nearest = order[first]
    arrow = require("pyarrow", extra="curate", purpose="curation")
    output.write_table(
        arrow.table({"position": once, "times": times, "seed": seed[nearest], "cosine": cosine[nearest]})
    )
    return Counts(len(seed), len(once), {"found before": len(seed) - len(once)})
