"""How many images of each cluster are drawn."""

from __future__ import annotations

import numpy as np

from dinov2.curate.clusters import Clusters, balanced_quotas, water_fill
from dinov2.curate.clusters.lloyd import nearest_centroids
from dinov2.curate.clusters.stage import PORTION
from dinov2.curate.pool import Pool, read_array
from dinov2.curate.retrieve.config import RetrieveConfig
from dinov2.curate.search.layout import read_layout
from dinov2.curate.search.vectors import PoolVectors
from dinov2.curate.steps import Counts, Output
from dinov2_kernels._extras import require


def quotas_by_seeds(output: Output, clusters: Clusters, seeds: Pool, layout: str, config: RetrieveConfig) -> Counts:
    """Task: for each cluster that holds ``min_seeds`` seeds min(its size, ``per_cluster``) images, for others none.

    Where that is more than ``cap`` in all, all are cut at the level at which it is ``cap``.
    """
    centroids, places = clusters.read_centroids(), read_layout(layout)
    held = np.zeros(len(centroids), np.int64)
    vectors = PoolVectors(seeds, places)
    for start in range(0, places.rows, PORTION):
        block, _ = vectors.block(start, min(start + PORTION, places.rows))
        if len(block):
            held += np.bincount(nearest_centroids(block, centroids).cluster, minlength=len(centroids))
    wanted = np.where(held >= config.min_seeds, np.minimum(sizes_of(clusters, len(held)), config.per_cluster), 0)
    quotas = water_fill(wanted, config.cap)
    output.write_array(quotas)
    return Counts(len(held), int((quotas > 0).sum()), {}, {"images": int(quotas.sum()), "seeds": int(held.sum())})


def quotas_of_hierarchy(output: Output, clusters: Clusters, config: RetrieveConfig) -> Counts:
    """Task: a balanced share for each cluster."""
    sizes = sizes_of(clusters, len(clusters.read_centroids()))
    quotas = balanced_quotas(sizes, clusters.read_parents(), config.total or int(sizes.sum()) // 2)
    output.write_array(quotas)
    return Counts(len(sizes), int((quotas > 0).sum()), {}, {"images": int(quotas.sum())})


def sizes_of(clusters: Clusters, k: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Images of each cluster [k]."""
    sizes = np.zeros(k, np.int64)
    for shard in read_layout(clusters.layout).names:
        cluster = clusters.read_clusters(shard)
        sizes += np.bincount(cluster[cluster >= 0], minlength=k)
    return sizes


def write_drawn(output: Output, drawn: str) -> Counts:
    """Task: what was drawn as the table of what was found, in which no seed is named."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    position = np.array(read_array(drawn, "all"))
    nothing = {"seed": arrow.nulls(len(position), "int64"), "cosine": arrow.nulls(len(position), "float32")}
    output.write_table(arrow.table({"position": position, "times": np.ones_like(position), **nothing}))
    return Counts(len(position), len(position))
