"""k-means of a pool as steps: a sample gives the first centroids, passes over all shards improve them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2.curate.clusters.config import ClusterConfig
from dinov2.curate.clusters.lloyd import k_means_in_memory, means_of, nearest_centroids, resampled, sums_of
from dinov2.curate.pool import Pool, read_array, read_table
from dinov2.curate.search.layout import read_layout
from dinov2.curate.search.vectors import PoolVectors
from dinov2.curate.steps import Counts, Output, Step, Steps, Task

ROWS_OF_TASK = 500_000  # of a pass
PORTION = 65_536  # rows in memory at once


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
