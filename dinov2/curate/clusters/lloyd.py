"""Lloyd's iteration: the nearest centroid of each vector, and the mean of each centroid's vectors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dinov2_kernels._extras import require

Floats = npt.NDArray[np.float32]

CELLS = 2**24  # distances in memory at once


class Nearest(NamedTuple):
    """The nearest centroid of each vector.

    Attributes:
        cluster: its number, of equally near ones the lowest; int64 [N].
        distance: squared, at least 0; float32 [N].
    """

    cluster: npt.NDArray[np.int64]
    distance: Floats


def nearest_centroids(vectors: npt.NDArray[np.floating], centroids: Floats) -> Nearest:
    """Of vectors [N, D] and centroids [K, D], in blocks of bounded memory."""
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
    """For each cluster the sum of its vectors, their number and their squared distances: [k, D + 2]."""
    result = np.zeros((k, vectors.shape[1] + 2))
    torch.from_numpy(result[:, :-2]).index_add_(
        0, torch.from_numpy(nearest.cluster), torch.from_numpy(np.array(vectors, np.float64))
    )
    result[:, -2] = np.bincount(nearest.cluster, minlength=k)
    result[:, -1] = np.bincount(nearest.cluster, nearest.distance, minlength=k)
    return result


def means_of(sums: npt.NDArray[np.float64], before: Floats) -> Floats:
    """Centroids [k, D] from what :func:`sums_of` gives; one without vectors stays where it was."""
    counts = sums[:, -2:-1]
    return np.where(counts > 0, sums[:, :-2] / np.maximum(counts, 1), before).astype(np.float32)


def k_means_in_memory(vectors: Floats, k: int, iterations: int, seed: int) -> Floats:
    """Centroids [k, D] of vectors [N, D], N at least k, by Faiss."""
    faiss = require("faiss", extra="curate", purpose="clustering")
    if len(vectors) == k:
        return vectors.copy()
    trained = faiss.Kmeans(
        vectors.shape[1],
        k,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(len(vectors) // k + 1, 1),
        gpu=bool(getattr(faiss, "get_num_gpus", lambda: 0)()),
    )
    trained.train(np.ascontiguousarray(vectors, np.float32))
    centroids: Floats = trained.centroids.reshape(k, -1)
    return centroids


def resampled(vectors: Floats, centroids: Floats, rounds: int, nearest: int) -> Floats:
    """Centroids after rounds of resampling-clustering, by which they spread more evenly over what the vectors span.

    In each round k-means goes on from the centroids with only the ``nearest`` vectors of each cluster, so that dense
    places count for no more than sparse ones (Vo et al., arXiv:2405.15613, section 3.3).
    """
    for _ in range(rounds):
        found = nearest_centroids(vectors, centroids)
        order = np.lexsort((found.distance, found.cluster))
        cluster = found.cluster[order]
        place = np.arange(len(order)) - np.searchsorted(cluster, cluster, side="left")
        few = vectors[np.sort(order[place < nearest])]
        again = nearest_centroids(few, centroids)
        centroids = means_of(sums_of(few, again, len(centroids)), centroids)
    return centroids
