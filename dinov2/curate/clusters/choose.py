"""So many images of each cluster, drawn without replacement."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from dinov2.curate.clusters.stage import Clusters
from dinov2.curate.pool import read_array
from dinov2.curate.search.layout import read_layout
from dinov2.curate.steps import Counts, Output

Positions = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

WAITING = 2**20  # candidates at least that are sorted in among those drawn at a time


def choose(output: Output, clusters: Clusters, quotas: str, seed: int, purpose: str) -> Counts:
    """Task: write ``all.npy``, the positions int64 of ``quotas[k]`` images of each cluster k, ascending.

    Every position has a random key, and those with the smallest keys of a cluster are drawn. What is in memory are one
    shard, the images drawn and at most as many (or :data:`WAITING`) candidates.

    Args:
        output: of the task.
        clusters: of the pool.
        quotas: folder of ``all.npy``, int64 [K].
        seed: of the keys.
        purpose: whose draw it is; each purpose has keys of its own.
    """
    layout = read_layout(clusters.layout)
    smallest = SmallestKeys(np.array(read_array(quotas, "all")))
    for shard, start in zip(layout.names, layout.starts.tolist(), strict=False):
        cluster = clusters.read_clusters(shard)
        rows = np.flatnonzero(cluster >= 0)
        smallest.offer(cluster[rows], start + rows, random_keys(start + rows, seed, purpose))
    drawn = smallest.drawn()
    output.write_array(drawn)
    return Counts(layout.rows, len(drawn))


class SmallestKeys:
    """Of all positions that are offered the ``quotas[k]`` of each cluster k that have the smallest keys.

    A cluster that has its number takes only keys up to its largest. Of N images n are drawn, so about
    n (1 + log(N / n)) are ever sorted, in runs that are no shorter than what they are sorted into.
    """

    def __init__(self, quotas: Positions, waiting: int = WAITING) -> None:
        self._quotas = quotas
        self._wait_for = waiting
        self._bounds = np.where(quotas > 0, np.iinfo(np.uint64).max, np.uint64(0)).astype(np.uint64)  # [K]
        self._drawn = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint64))
        self._waiting: list[tuple[npt.NDArray[np.int32], Positions, Keys]] = []
        self._rows_waiting = 0

    def offer(self, clusters: npt.NDArray[np.int32], positions: Positions, keys: Keys) -> None:
        """Clusters [N], positions [N] and keys [N], which differ from each other and from all before."""
        wanted = keys <= self._bounds[clusters]
        self._waiting.append((clusters[wanted], positions[wanted], keys[wanted]))
        self._rows_waiting += int(wanted.sum())
        if self._rows_waiting >= max(len(self._drawn[0]), self._wait_for):
            self._sort_in()

    def drawn(self) -> Positions:
        """Their positions, ascending."""
        self._sort_in()
        return np.sort(self._drawn[1])

    def _sort_in(self) -> None:
        clusters, positions, keys = map(np.concatenate, zip(self._drawn, *self._waiting, strict=True))
        self._waiting, self._rows_waiting = [], 0
        order = np.lexsort((keys, clusters))
        ordered = clusters[order]
        place = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
        quotas = self._quotas[ordered]
        last = order[place == quotas - 1]  # of each cluster that has its number
        self._bounds[clusters[last]] = keys[last]
        order = order[place < quotas]
        self._drawn = clusters[order], positions[order], keys[order]


def random_keys(positions: Positions, seed: int, purpose: str) -> Keys:
    """A random number for each position, no two alike; those of another seed or purpose have nothing to do with them.

    SplitMix64 (Steele, Lea, Flood, 2014) of the position, and again of that with a digest of seed and purpose.
    """
    stream = hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8]
    with np.errstate(over="ignore"):
        z = _mixed(positions.astype(np.uint64))
        return _mixed(z + np.uint64(int.from_bytes(stream, "little")))


def _mixed(z: Keys) -> Keys:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
