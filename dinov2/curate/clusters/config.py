"""Settings of clustering."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

ROWS_PER_CLUSTER = 7_440  # DINOv2: 744 million images in 100,000 clusters


@dataclass(frozen=True)
class ClusterConfig:
    """k-means of a pool's features, and of its own centroids."""

    clusters: int = 0
    """Of images; 0 is one for each 7,440 of them, the average of DINOv2."""
    levels: tuple[int, ...] = ()
    """Clusters of clusters, for balanced sampling: their number on each higher level, from below; ever fewer."""
    iterations: int = 20
    """Of k-means on a sample."""
    sample: int = 256
    """Images of that sample for each cluster."""
    passes: int = 5
    """Iterations on all images after that."""
    resampling: int = 10
    """Rounds in which higher levels are clustered again by the members nearest to each centroid (arXiv:2405.15613)."""
    nearest: int = 5
    """How many of these members a cluster has a say with."""
    seed: int = 0
    """Of the sample and of the first centroids."""

    def __post_init__(self) -> None:
        for name in ("clusters", "passes", "resampling"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, but is {getattr(self, name)}")
        for name in ("iterations", "sample", "nearest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")
        if not 0 <= self.seed < 2**30:  # Faiss takes 31 bits, of a start or round as much more as its number
            raise ValueError(f"seed must be from 0 to {2**30 - 1}, but is {self.seed}")
        if any(upper >= lower for lower, upper in itertools.pairwise((self.clusters or 2**31, *self.levels))):
            raise ValueError(f"levels must have fewer clusters each than the one below, but are {self.levels}")

    def number(self, rows: int) -> int:
        """Clusters of a pool of ``rows`` images."""
        return min(self.clusters or max(rows // ROWS_PER_CLUSTER, 1), max(rows, 1))
