"""k-means clusters of a pool's features, a hierarchy of clusters, and balanced samples from it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2.configuration import Config, Count, CountOr0, Rules
from dinov2.curate.lloyd import k_means_in_memory, means_of, nearest_centroids, resampled, sums_of
from dinov2.curate.pool import Pool, read_array, read_table
from dinov2.curate.search.vectors import PoolVectors, read_layout, width_of
from dinov2.curate.steps import Counts, Output, Step, Steps, Task

ROWS_PER_CLUSTER = 7_440  # DINOv2: 744 million images in 100,000 clusters
ROWS_OF_TASK = 500_000  # rows of one task in a pass over the pool
PORTION = 65_536  # rows in memory at once
Integers = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

WAITING = 2**20  # least number of candidates that are sorted together


@dataclass(frozen=True)
class ClusterConfig(Config, at="clusters"):
    """k-means of a pool's features, and of its own centroids."""

    clusters: CountOr0 = 0
    """The pool is split into this many clusters. 0 takes the square root of the number of images. From 55 million
    images on, it makes one for each 7,440 images, the average of DINOv2."""
    levels: tuple[int, ...] = ()
    """Clusters are clustered again for balanced sampling. Give the number of clusters on each higher level, from below;
    each must be smaller than the one before."""
    iterations: Count = 20
    """k-means runs this many iterations on a sample."""
    sample: Count = 256
    """The sample holds this many images for each cluster."""
    passes: CountOr0 = 5
    """After the sample, k-means runs this many iterations on all images."""
    resampling: CountOr0 = 10
    """Higher levels are clustered this many times more, by the members nearest to each centroid (arXiv:2405.15613)."""
    nearest: Count = 5
    """Each cluster is represented by this many members when higher levels are clustered again."""
    seed: CountOr0 = 0
    """This seed decides the sample and the first centroids."""

    def rules(self) -> Rules:
        """Levels shrink. Faiss takes seeds of 31 bits, and the number of a start or round is added to ours."""
        yield "seed", self.seed < 2**30, f"from 0 to {2**30 - 1}"
        are_fewer = all(upper < lower for lower, upper in itertools.pairwise((self.clusters or 2**31, *self.levels)))
        yield "levels", are_fewer, "fewer clusters on each level than on the one below"

    def number(self, rows: int) -> int:
        """The number of clusters of a pool of ``rows`` images."""
        return min(self.clusters or max(rows // ROWS_PER_CLUSTER, math.isqrt(rows), 1), max(rows, 1))


@dataclass(frozen=True)
class Clusters:
    """The result of k-means, as paths: small enough to be an argument of tasks.

    Attributes:
        centroids: folder of ``all.npy``, float32 [K, D].
        assignments: folder of one table a shard, with ``cluster`` (int32, -1 for rows that are out) and ``distance``
            (float32, squared; NaN for rows that are out).
        upper: folder of ``all.parents.N.npy``, which gives for each cluster its parent on the higher level N; None if
            there are no higher levels.
        levels: number of higher levels.
        layout: folder of the pool's layout.
    """

    centroids: str
    assignments: str
    upper: str | None
    levels: int
    layout: str

    def read_centroids(self) -> npt.NDArray[np.float32]:
        """Centroids [K, D]."""
        return np.array(read_array(self.centroids, "all"), np.float32)

    def read_parents(self) -> list[npt.NDArray[np.int64]]:
        """For each level the parent of each cluster, as :func:`balanced_quotas` takes it."""
        if self.upper is None:
            return []
        return [np.array(read_array(self.upper, f"all.parents.{level}")) for level in range(self.levels)]

    def read_clusters(self, shard: str) -> npt.NDArray[np.int32]:
        """The cluster of each row of a shard."""
        clusters: npt.NDArray[np.int32] = read_table(self.assignments, shard, ["cluster"])["cluster"].to_numpy()
        return clusters


def k_means(pool: Pool, layout: str, config: ClusterConfig, output: str, stage: str) -> Steps[Clusters]:
    """Cluster a pool's features by squared Euclidean distance. For unit vectors it gives the same order as the cosine.

    Args:
        pool: images with features.
        layout: folder of the pool's layout.
        config: number of clusters and iterations.
        output: folder or URL of the whole curation.
        stage: first part of the steps' names.

    Raises:
        ValueError: the pool has no features.
    """
    if pool.features is None:
        raise ValueError("pool: expected features, got none: embed it first")
    inputs = (layout, pool.features, *pool.decisions)
    settings = config if config.clusters else [config, "as many as the square root"]  # 0 meant fewer in older folders
    first = Step(output, f"{stage}-start", settings, inputs, [Task("all", _start, (pool, layout, config))], gpu=True)
    yield first
    centroids = first.folder
    names = read_layout(layout).names
    groups = read_layout(layout).groups(ROWS_OF_TASK)
    for number in range(config.passes):
        tasks = [Task(f"{i:05d}", _sum, (pool, layout, group, centroids)) for i, group in enumerate(groups)]
        sums = Step(output, f"{stage}-sums", number, (layout, pool.features, centroids), tasks)
        yield sums
        task = Task("all", _average, (sums.folder, tuple(task.shard for task in tasks), centroids))
        means = Step(output, f"{stage}-centroids", number, (sums.folder, centroids), [task], "clusters")
        yield means
        centroids = means.folder
    tasks = [Task(shard, _assign, (pool, layout, shard, centroids)) for shard in names]
    assigned = Step(output, f"{stage}-assignments", None, (layout, pool.features, centroids), tasks)
    yield assigned
    if not config.levels:
        return Clusters(centroids, assigned.folder, None, 0, layout)
    levels = [Task("all", _levels, (centroids, config))]
    upper = Step(output, f"{stage}-levels", config, (centroids,), levels, "clusters", gpu=True)
    yield upper
    return Clusters(centroids, assigned.folder, upper.folder, len(config.levels), layout)


def _start(output: Output, pool: Pool, layout: str, config: ClusterConfig) -> Counts:
    """Task: compute centroids of a sample."""
    places = read_layout(layout)
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(_present(pool, shard, places.range_of(shard)[0]) for shard in places.names)]
    )
    if not len(rows):  # one cluster without images, so that no later step needs a rule for empty pools
        output.write_array(np.zeros((1, width_of(pool, places)), np.float32))
        return Counts(0, 0, {}, {"clusters": 1})
    k = config.number(len(rows))
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(rows, min(len(rows), k * config.sample), replace=False))
    vectors = PoolVectors(pool, places).gather(chosen).astype(np.float32)  # [S, D]
    output.write_array(k_means_in_memory(vectors, k, config.iterations, config.seed))
    return Counts(len(rows), len(chosen), {}, {"clusters": k})


def _present(pool: Pool, shard: str, start: int) -> npt.NDArray[np.int64]:
    """Positions of a shard's rows that are in and have features."""
    features = pool.read_features(shard)
    finite = np.isfinite(np.asarray(features[:, :1], np.float32)).all(axis=1)
    return start + np.flatnonzero(finite & pool.kept(shard))


def _sum(output: Output, pool: Pool, layout: str, group: tuple[str, ...], centroids: str) -> Counts:
    """Task: add up the vectors, numbers and distances of each cluster in a group of shards."""
    places, C = read_layout(layout), np.array(read_array(centroids, "all"), np.float32)
    vectors, total, rows = PoolVectors(pool, places), np.zeros((len(C), C.shape[1] + 2)), 0
    start, stop = places.range_of(group[0])[0], places.range_of(group[-1])[1]
    for low in range(start, stop, PORTION):
        block, _ = vectors.block(low, min(low + PORTION, stop))
        if len(block):
            total += sums_of(block, nearest_centroids(block, C), len(C))
            rows += len(block)
    output.write_array(total)
    return Counts(rows, rows)


def _average(output: Output, sums: str, names: tuple[str, ...], centroids: str) -> Counts:
    """Task: compute new centroids from the sums."""
    before = np.array(read_array(centroids, "all"), np.float32)
    total = np.zeros((len(before), before.shape[1] + 2))
    for name in names:
        total += read_array(sums, name)
    output.write_array(means_of(total, before))
    empty = int((total[:, -2] == 0).sum())
    return Counts(
        len(before),
        len(before),
        {},
        {"without images": empty, "inertia, in millionths": round(total[:, -1].sum() * 1e6)},
    )


def _assign(output: Output, pool: Pool, layout: str, shard: str, centroids: str) -> Counts:
    """Task: assign each row of a shard to a cluster."""
    places, C = read_layout(layout), np.array(read_array(centroids, "all"), np.float32)
    start, stop = places.range_of(shard)
    cluster, distance = np.full(stop - start, -1, np.int32), np.full(stop - start, np.nan, np.float32)
    vectors = PoolVectors(pool, places)
    for low in range(start, stop, PORTION):
        block, positions = vectors.block(low, min(low + PORTION, stop))
        if len(block):
            found = nearest_centroids(block, C)
            cluster[positions - start], distance[positions - start] = found.cluster, found.distance
    output.write_table({"cluster": cluster, "distance": distance})
    rows = int((cluster >= 0).sum())
    return Counts(rows, rows)


def _levels(output: Output, centroids: str, config: ClusterConfig) -> Counts:
    """Task: cluster the centroids, level by level."""
    points = np.array(read_array(centroids, "all"), np.float32)
    for level, number in enumerate(config.levels):
        number = min(number, len(points))
        upper = k_means_in_memory(points, number, config.iterations, config.seed)
        upper = resampled(points, upper, config.resampling, config.nearest, config.iterations, config.seed)
        with output.replace(f".parents.{level}.npy") as file:
            np.save(file, nearest_centroids(points, upper).cluster)
        points = upper
    return Counts(len(points), len(points))


def water_fill(sizes: Integers, total: int) -> Integers:
    """Share out ``total`` as equally as ``sizes`` allow. No share exceeds its size, and no share exceeds another that
    still has room. The remainder goes to the first shares with room, one each.

    Args:
        sizes: largest share of each, int64 [K], not negative.
        total: sum of all shares; if it exceeds the sum of sizes, each share is its size.

    Returns:
        Shares, int64 [K]; their sum is the smaller of ``total`` and the sum of sizes.
    """
    if total >= sizes.sum():
        return sizes.copy()
    low, high = 0, int(sizes.max(initial=0))  # the largest level that does not overflow
    while low < high:
        level = (low + high + 1) // 2
        if np.minimum(sizes, level).sum() <= total:
            low = level
        else:
            high = level - 1
    shares = np.minimum(sizes, low)
    room = np.flatnonzero(sizes > low)
    shares[room[: total - int(shares.sum())]] += 1
    return shares


def balanced_quotas(sizes: Integers, parents: Sequence[Integers], total: int) -> Integers:
    """Share out images over the lowest clusters of a hierarchy. From the top level down, :func:`water_fill` shares out
    each cluster's share over its own clusters.

    Args:
        sizes: number of images of each lowest cluster, int64 [K].
        parents: for each level, from the lowest up, the parent of each cluster; empty for a single level.
        total: number of images wanted.

    Returns:
        Shares of the lowest clusters, int64 [K].
    """
    if not parents:
        return water_fill(sizes, total)
    parent = parents[0]
    number = len(parents[1]) if len(parents) > 1 else 0  # of clusters on the next level; the last may have no children
    above = np.zeros(max(number, int(parent.max(initial=-1)) + 1), np.int64)
    np.add.at(above, parent, sizes)
    shares = balanced_quotas(above, parents[1:], total)
    quotas = np.zeros_like(sizes)
    order = np.argsort(parent, kind="stable")
    cuts = np.searchsorted(parent[order], np.arange(len(shares) + 1))
    for cluster, share in enumerate(shares.tolist()):
        members = order[cuts[cluster] : cuts[cluster + 1]]
        quotas[members] = water_fill(sizes[members], share)
    return quotas


def choose(output: Output, clusters: Clusters, quotas: str, seed: int, purpose: str) -> Counts:
    """Task: write ``all.npy``, the positions int64 of ``quotas[k]`` images of each cluster k, ascending.

    Every position has a random key. The positions with the smallest keys of a cluster are drawn. Memory holds one
    shard, the images drawn, and at most as many candidates again (or :data:`WAITING`).

    Args:
        output: where the task writes.
        clusters: clusters of the pool.
        quotas: folder of ``all.npy``, int64 [K].
        seed: decides the keys.
        purpose: name of the draw; each purpose has keys of its own.
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
    """Keeps, for each cluster k, the ``quotas[k]`` offered positions that have the smallest keys.

    A cluster that is full accepts only keys up to its largest. If n of N images are drawn, about n (1 + log(N / n)) are
    ever sorted. Each run of new candidates is at least as long as the list that it is sorted into.
    """

    def __init__(self, quotas: Positions, waiting: int = WAITING) -> None:
        self._quotas = quotas
        self._wait_for = waiting
        self._bounds = np.where(quotas > 0, np.iinfo(np.uint64).max, np.uint64(0)).astype(np.uint64)  # [K]
        self._drawn = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint64))
        self._waiting: list[tuple[npt.NDArray[np.int32], Positions, Keys]] = []
        self._rows_waiting = 0

    def offer(self, clusters: npt.NDArray[np.int32], positions: Positions, keys: Keys) -> None:
        """Take clusters [N], positions [N] and keys [N]. All keys of all calls differ."""
        wanted = keys <= self._bounds[clusters]
        self._waiting.append((clusters[wanted], positions[wanted], keys[wanted]))
        self._rows_waiting += int(wanted.sum())
        if self._rows_waiting >= max(len(self._drawn[0]), self._wait_for):
            self._sort_in()

    def drawn(self) -> Positions:
        """The positions drawn, ascending."""
        self._sort_in()
        return np.sort(self._drawn[1])

    def _sort_in(self) -> None:
        clusters, positions, keys = map(np.concatenate, zip(self._drawn, *self._waiting, strict=True))
        self._waiting, self._rows_waiting = [], 0
        order = np.lexsort((keys, clusters))
        ordered = clusters[order]
        place = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
        quotas = self._quotas[ordered]
        last = order[place == quotas - 1]  # the largest key of each full cluster
        self._bounds[clusters[last]] = keys[last]
        order = order[place < quotas]
        self._drawn = clusters[order], positions[order], keys[order]


def random_keys(positions: Positions, seed: int, purpose: str) -> Keys:
    """A random number for each position, all different and independent of those of another seed or purpose.

    SplitMix64 (Steele, Lea, Flood, 2014) mixes the position, then mixes the result with a digest of seed and purpose.
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
