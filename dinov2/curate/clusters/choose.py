"""So many images of each cluster, drawn without replacement."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.curate.clusters.stage import Clusters
from dinov2.curate.pool import read_array
from dinov2.curate.search.layout import read_layout
from dinov2.curate.steps import Counts, Output

Positions = npt.NDArray[np.int64]


def choose(output: Output, clusters: Clusters, quotas: str, seed: int) -> Counts:
    """Task: write ``all.npy``, the positions int64 of ``quotas[k]`` images of each cluster k, ascending.

    Every position has a random key, and those with the smallest keys of a cluster are drawn. At no time are more images
    in memory than are drawn, and those of one shard.

    Args:
        output: of the task.
        clusters: of the pool.
        quotas: folder of ``all.npy``, int64 [K].
        seed: of the keys.
    """
    layout, limits = read_layout(clusters.layout), np.array(read_array(quotas, "all"))
    drawn = np.zeros(0, np.int64)
    cluster_of_drawn = np.zeros(0, np.int64)
    for shard in layout.names:
        cluster = clusters.read_clusters(shard).astype(np.int64)
        rows = np.flatnonzero(cluster >= 0)
        rows = rows[limits[cluster[rows]] > 0]
        positions = np.concatenate([drawn, layout.range_of(shard)[0] + rows])
        clusters_of = np.concatenate([cluster_of_drawn, cluster[rows]])
        order = np.lexsort((positions, random_keys(positions, seed), clusters_of))
        sorted_clusters = clusters_of[order]
        place = np.arange(len(order)) - np.searchsorted(sorted_clusters, sorted_clusters, side="left")
        order = order[place < limits[sorted_clusters]]
        drawn, cluster_of_drawn = positions[order], clusters_of[order]
    output.write_array(np.sort(drawn))
    return Counts(layout.rows, len(drawn))


def random_keys(positions: Positions, seed: int) -> npt.NDArray[np.uint64]:
    """A random number for each position: SplitMix64 (Steele, Lea, Flood, 2014) of the position and the seed."""
    with np.errstate(over="ignore"):
        z = positions.astype(np.uint64) + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        for _ in range(2):  # once is not enough for consecutive numbers of one seed and another
            z += np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return z
