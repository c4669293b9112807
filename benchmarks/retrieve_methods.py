"""Ways to retrieve images for 10,000 seeds. ``retrieve_methods.py METHOD FOLDER`` runs one of them.

The folder is that of :mod:`benchmarks.dedup_methods`, with the seeds as a pool in ``seeds``. A method prints its
seconds, without imports, and a number for its quality.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

NEIGHBOURS = 4
CLUSTERS = 1000
Result = tuple[float, float]


def sample(folder: Path) -> Result:
    """This package: nearest neighbours of each seed. The number is the recall against brute force, for 500 seeds."""
    from dinov2.curate.pool import read_table

    seconds, decisions, pool = _ours(folder, "sample")
    times = np.concatenate([read_table(decisions, shard, ["times"])["times"].to_numpy() for shard in pool.shards()])
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    seeds = np.load(folder / "seeds.npy")[:500].astype(np.float32)
    best = np.full((len(seeds), NEIGHBOURS), -2, np.float32)
    place = np.zeros((len(seeds), NEIGHBOURS), np.int64)
    for start in range(0, len(vectors), 100_000):
        cosines = seeds @ vectors[start : start + 100_000].astype(np.float32).T
        joined = np.concatenate([best, cosines], axis=1)
        rows = np.concatenate([place, np.broadcast_to(start + np.arange(cosines.shape[1]), cosines.shape)], axis=1)
        order = np.argsort(-joined, axis=1)[:, :NEIGHBOURS]
        best, place = np.take_along_axis(joined, order, 1), np.take_along_axis(rows, order, 1)
    return seconds, float((times[place] > 0).mean())


def cluster(folder: Path) -> Result:
    """This package: some images of clusters with seeds. The number is the mean squared distance to the centroids."""
    from dinov2.curate.pool import read_table

    seconds, _, pool = _ours(folder, "cluster")
    (assigned,) = (folder / "out-cluster").glob("retrieve-assignments-*")
    parts = [read_table(str(assigned), shard, ["distance"])["distance"].to_numpy() for shard in pool.shards()]
    return seconds, float(np.concatenate(parts).mean())


def faiss_brute_force(folder: Path) -> Result:
    """``faiss.knn`` of all seeds, vectors in memory."""
    import faiss

    vectors, seeds = (np.load(folder / f"{name}.npy").astype(np.float32) for name in ("vectors", "seeds"))
    started = time.monotonic()
    faiss.knn(seeds, vectors, NEIGHBOURS, metric=faiss.METRIC_INNER_PRODUCT)
    return time.monotonic() - started, 1.0


def faiss_kmeans(folder: Path) -> Result:
    """``faiss.Kmeans``, 25 iterations on 256 sampled vectors a cluster, then the nearest centroid of every vector."""
    import faiss

    vectors = np.load(folder / "vectors.npy").astype(np.float32)
    started = time.monotonic()
    means = faiss.Kmeans(vectors.shape[1], min(CLUSTERS, len(vectors) // 40), niter=25, seed=0)
    means.train(vectors)
    distance, _ = means.index.search(vectors, 1)
    return time.monotonic() - started, float(distance.mean())


def _ours(folder: Path, method: str):  # type: ignore[no-untyped-def]  # types are imported here only
    from dinov2.curate import run_steps
    from dinov2.curate.clusters import ClusterConfig
    from dinov2.curate.engines import ProcessPool
    from dinov2.curate.pool import Pool
    from dinov2.curate.retrieve import RetrieveConfig, retrieve

    pool, seeds = (Pool(str(root), features=str(root / "features")) for root in (folder / "pool", folder / "seeds"))
    rows = len(np.load(folder / "vectors.npy", mmap_mode="r"))
    clusters = ClusterConfig(clusters=min(CLUSTERS, rows // 40))
    config = RetrieveConfig(method=method, neighbours=NEIGHBOURS, clusters=clusters)  # type: ignore[arg-type]
    output = folder / f"out-{method}"
    started = time.monotonic()
    with ProcessPool() as engine:
        after = run_steps(retrieve(pool, {"seeds": seeds}, config, str(output)), engine)
    return time.monotonic() - started, after.decisions[-1], pool


METHODS: dict[str, Callable[[Path], Result]] = {
    function.__name__: function for function in (sample, cluster, faiss_brute_force, faiss_kmeans)
}

if __name__ == "__main__":
    tempfile.tempdir = sys.argv[2]
    print(*METHODS[sys.argv[1]](Path(sys.argv[2])))
