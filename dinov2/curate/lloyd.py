"""Lloyd's iteration: find the nearest centroid of each vector, then the mean of each centroid's vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.extras import require

if TYPE_CHECKING:
    from torch import Tensor

Floats = npt.NDArray[np.float32]

CELLS = 2**24  # distances in memory at once
STARTS, STARTS_BELOW = 3, 128  # with few clusters one start may end badly; with many, luck evens out
SPREAD_BELOW = 2048  # clusters; from there on k-means++ would take longer than the iterations after it


class Nearest(NamedTuple):
    """The nearest centroid of each vector.

    Attributes:
        cluster: number of the nearest centroid; among equals, the lowest; int64 [N].
        distance: squared distance to it, at least 0; float32 [N].
    """

    cluster: npt.NDArray[np.int64]
    distance: Floats


def nearest_centroids(vectors: npt.NDArray[np.floating], centroids: Floats) -> Nearest:
    """The nearest of centroids [K, D] for each of vectors [N, D], in blocks of bounded memory."""
    import torch

    C = torch.from_numpy(centroids)
    squares = (C * C).sum(dim=1)  # [K]
    clusters = np.empty(len(vectors), np.int64)
    distances = np.empty(len(vectors), np.float32)
    rows = max(CELLS // max(len(centroids), 1), 1)
    for start in range(0, len(vectors), rows):
        X = torch.from_numpy(np.array(vectors[start : start + rows], np.float32))
        half, cluster = torch.addmm(squares, X, C.T, alpha=-2).min(dim=1)
        clusters[start : start + rows] = cluster.numpy()
        distances[start : start + rows] = (half + (X * X).sum(dim=1)).clamp_min(0).numpy()
    return Nearest(clusters, distances)


def sums_of(vectors: npt.NDArray[np.floating], nearest: Nearest, k: int) -> npt.NDArray[np.float64]:
    """For each cluster the sum of its vectors, their number and the sum of their squared distances: [k, D + 2]."""
    import torch

    result = np.zeros((k, vectors.shape[1] + 2))
    torch.from_numpy(result[:, :-2]).index_add_(
        0, torch.from_numpy(nearest.cluster), torch.from_numpy(np.array(vectors, np.float64))
    )
    result[:, -2] = np.bincount(nearest.cluster, minlength=k)
    result[:, -1] = np.bincount(nearest.cluster, nearest.distance, minlength=k)
    return result


def means_of(sums: npt.NDArray[np.float64], before: Floats) -> Floats:
    """Centroids [k, D] from the sums of :func:`sums_of`. A centroid without vectors stays where it was."""
    counts = sums[:, -2:-1]
    return np.where(counts > 0, sums[:, :-2] / np.maximum(counts, 1), before).astype(np.float32)


def k_means_in_memory(vectors: Floats, k: int, iterations: int, seed: int) -> Floats:
    """Centroids [k, D] of vectors [N, D], with N at least k, by Faiss.

    They start from k-means++ unless there are too many clusters for it. For few clusters the best of several runs is
    taken.
    """
    faiss = require("faiss", extra="curate", purpose="clustering")
    if len(vectors) == k:
        return vectors.copy()
    vectors = np.ascontiguousarray(vectors, np.float32)
    best: tuple[float, Floats] | None = None
    for start in range(STARTS if k < STARTS_BELOW else 1):
        trained = faiss.Kmeans(
            vectors.shape[1],
            k,
            niter=iterations,
            seed=seed + start,
            min_points_per_centroid=1,
            max_points_per_centroid=len(vectors) // k + 1,
            gpu=bool(getattr(faiss, "get_num_gpus", lambda: 0)()),
        )
        first = spread_start(vectors, k, seed + start) if k <= SPREAD_BELOW else None
        trained.train(vectors, init_centroids=first)
        if best is None or trained.obj[-1] < best[0]:
            best = float(trained.obj[-1]), trained.centroids.reshape(k, -1).copy()
    assert best is not None
    return best[1]


def spread_start(vectors: Floats, k: int, seed: int) -> Floats:
    """First centroids [k, D] by k-means++ (Arthur and Vassilvitskii, 2007).

    Candidates for each centroid are drawn from the vectors, with a probability proportional to their squared distance
    from the centroids so far. The candidate that reduces the distances most is taken.
    """
    import torch

    rng = np.random.default_rng(seed)
    X = torch.from_numpy(vectors)
    squares = (X * X).sum(dim=1)

    def distances(rows: list[int]) -> Tensor:
        cross = torch.addmm(squares[:, None], X, X[rows].T, alpha=-2)  # [N, candidates]
        return (cross + squares[rows]).clamp_min(0).T.contiguous()

    chosen = [int(rng.integers(len(vectors)))]
    nearest = distances(chosen)[0].double()  # [N]
    candidates = 2 + int(np.log(k))
    while len(chosen) < k:
        sums = nearest.cumsum(0)
        picks = torch.searchsorted(sums, torch.from_numpy(rng.random(candidates)) * sums[-1]).clamp_max(len(X) - 1)
        left = torch.minimum(nearest, distances(picks.tolist()).double())  # [candidates, N]
        best = int(left.sum(dim=1).argmin())
        chosen.append(int(picks[best]))
        nearest = left[best]
    return vectors[chosen]


def resampled(vectors: Floats, centroids: Floats, rounds: int, nearest: int, iterations: int, seed: int) -> Floats:
    """Centroids after rounds of resampling-clustering, which spreads them more evenly over the space of the vectors.

    Each round restarts k-means on only the ``nearest`` vectors of each cluster, so that dense regions count no more
    than sparse ones (Vo et al., arXiv:2405.15613, section 3.3).
    """
    for number in range(rounds):
        found = nearest_centroids(vectors, centroids)
        order = np.lexsort((found.distance, found.cluster))
        cluster = found.cluster[order]
        place = np.arange(len(order)) - np.searchsorted(cluster, cluster, side="left")
        few = vectors[np.sort(order[place < nearest])]
        if len(few) < len(centroids):
            break
        centroids = k_means_in_memory(few, len(centroids), iterations, seed + number)
    return centroids
