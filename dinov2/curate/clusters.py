"""Clusters of a pool's features by k-means, a hierarchy of them, and what a balanced sample takes of each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2.configuration import Config, Count, CountOr0, Rules
from dinov2.curate.lloyd import k_means_in_memory, means_of, nearest_centroids, resampled, sums_of
from dinov2.curate.pool import Pool, read_array, read_table
from dinov2.curate.search.vectors import PoolVectors, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task

ROWS_PER_CLUSTER = 7_440  # DINOv2: 744 million images in 100,000 clusters
ROWS_OF_TASK = 500_000  # of a pass
PORTION = 65_536  # rows in memory at once
Integers = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

WAITING = 2**20  # candidates at least that are sorted in among those drawn at a time


@dataclass(frozen=True)
class ClusterConfig(Config, at="clusters"):
    """k-means of a pool's features, and of its own centroids."""

    clusters: CountOr0 = 0
    """The pool is split into this many clusters. 0 makes one for each 7,440 images, the average of DINOv2."""
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
        """Levels shrink; Faiss takes seeds of 31 bits, and ours grow by the number of a start or round."""
        yield "seed", self.seed < 2**30, f"from 0 to {2**30 - 1}"
        are_fewer = all(upper < lower for lower, upper in itertools.pairwise((self.clusters or 2**31, *self.levels)))
        yield "levels", are_fewer, "fewer clusters on each level than on the one below"

    def number(self, rows: int) -> int:
        """Clusters of a pool of ``rows`` images."""
        return min(self.clusters or max(rows // ROWS_PER_CLUSTER, 1), max(rows, 1))


@dataclass(frozen=True)
class Clusters:
    """What k-means has found; small, so that tasks may take it as an argument.

    Attributes:
        centroids: folder of ``all.npy``, float32 [K, D].
        assignments: folder of a table a shard with ``cluster`` (int32, -1 for rows that are out) and ``distance``
            (float32, squared; NaN for these).
        upper: folder of ``all.parents.N.npy``, for each higher level N the cluster there of each one below; or None.
        levels: how many higher levels there are.
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
        """For each level the cluster on the next one, as :func:`balanced_quotas` takes it."""
        if self.upper is None:
            return []
        return [np.array(read_array(self.upper, f"all.parents.{level}")) for level in range(self.levels)]

    def read_clusters(self, shard: str) -> npt.NDArray[np.int32]:
        """The cluster of each row of a shard."""
        clusters: npt.NDArray[np.int32] = read_table(self.assignments, shard, ["cluster"])["cluster"].to_numpy()
        return clusters


def k_means(pool: Pool, layout: str, config: ClusterConfig, output: str, stage: str) -> Steps[Clusters]:
    """Cluster a pool's features by squared Euclidean distance, which for unit vectors orders as the cosine does.

    Args:
        pool: with features.
        layout: folder of its layout.
        config: how many clusters, and how long.
        output: folder or URL of the whole curation.
        stage: first part of the steps' names.

    Raises:
        ValueError: the pool has no features.
    """
    if pool.features is None:
        raise ValueError("pool must have features, but has none: embed it first")
    inputs = (layout, pool.features, *pool.decisions)
    first = Step(output, f"{stage}-start", config, inputs, [Task("all", _start, (pool, layout, config))], gpu=True)
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
    """Task: centroids of a sample."""
    places = read_layout(layout)
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(_present(pool, shard, places.range_of(shard)[0]) for shard in places.names)]
    )
    if not len(rows):
        raise ValueError("pool must have images with features to cluster, but has none")
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
    """Task: sums, numbers and distances of the clusters in a group of shards."""
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
    """Task: new centroids."""
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
    """Task: the cluster of each row of a shard."""
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
    """Task: clusters of clusters."""
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
    """Shares of ``total`` as equal as ``sizes`` allow: nobody gets more than his size, and none more than another who
    would have room for it, but for the remainder, of which the first get one each.

    Args:
        sizes: int64 [K], not negative.
        total: to be shared; where it exceeds their sum, all get their size.

    Returns:
        int64 [K] whose sum is the smaller of ``total`` and the sum of sizes.
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
    """Shares of the lowest clusters in a hierarchy: on each level, from the top, a cluster's share is filled into its
    own clusters like water.

    Args:
        sizes: images of each of the lowest clusters, int64 [K].
        parents: for each level from below the cluster on the next one that each belongs to; none for a single level.
        total: images wanted.

    Returns:
        int64 [K].
    """
    if not parents:
        return water_fill(sizes, total)
    parent = parents[0]
    number = len(parents[1]) if len(parents) > 1 else 0  # of clusters there; the last ones may be without any of these
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
