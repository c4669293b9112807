"""Pools of vectors without images, for the tests of stages that look at features alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet

from dinov2.curate.pool import Pool

Floats = npt.NDArray[np.floating]


def unit_vectors(vectors: Floats) -> npt.NDArray[np.float16]:
    """Vectors [N, D] at unit length, in float16."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def clustered_vectors(rows: int, dimensions: int, clusters: int, spread: float, seed: int) -> npt.NDArray[np.float16]:
    """Unit vectors [rows, dimensions] around random centres; cosines within a cluster are about 1 / (1 + spread^2)."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, dimensions))
    noise = random.standard_normal((rows, dimensions))
    return unit_vectors(centres[random.integers(clusters, size=rows)] + spread * noise)


def vector_pool(
    root: Path, vectors: npt.NDArray[np.float16], cuts: Sequence[int] = (), sizes: npt.NDArray[np.int64] | None = None
) -> Pool:
    """A pool with features [N, D], cut into shards before the rows ``cuts``; images are ``sizes`` [N] x 1 pixels."""
    sizes = np.ones(len(vectors), np.int64) if sizes is None else sizes
    (root / "index").mkdir(parents=True)
    (root / "features").mkdir()
    for number, (part, widths) in enumerate(zip(np.split(vectors, cuts), np.split(sizes, cuts), strict=True)):
        index = {"size": np.zeros(len(part), np.int32), "width": widths, "height": np.ones(len(part), np.int32)}
        pyarrow.parquet.write_table(pyarrow.table(index), root / f"index/{number:05d}.parquet")
        np.save(root / f"features/{number:05d}.npy", part)
    return Pool(str(root), features=str(root / "features"))
