"""Features of a pool by position, and their exact inner products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dinov2.curate.pool import Pool
from dinov2.curate.search.layout import Layout, Positions

Vectors = npt.NDArray[np.float16]

CHUNK = 8192  # pairs whose vectors are in memory at once

LENGTH_TOLERANCE = 0.02  # of vectors of unit length; float16 rounds the length of a long vector by 0.0005


def exact_cosines(first: Vectors, second: Vectors) -> npt.NDArray[np.float32]:
    """Inner products [N] of unit vectors [N, D] and [N, D] without any rounding but the last, to float32.

    Finite float16 numbers are multiples of 2^-24, so their products are multiples of 2^-48; float32 holds a product and
    float64 a sum of such below 32 in size without an error. The result is the same bits on every machine, whatever the
    order of summation.
    """
    products = torch.from_numpy(first).float() * torch.from_numpy(second).float()
    cosines: npt.NDArray[np.float32] = products.sum(1, dtype=torch.float64).float().numpy()
    return cosines


class PoolVectors:
    """The features of those rows of a pool that are still in.

    Args:
        pool: with features.
        layout: of its rows.
    """

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout

    def block(self, start: int, stop: int) -> tuple[Vectors, Positions]:
        """Features [N, D] at positions start to stop, less the rows that are out or have none; and positions [N].

        Raises:
            ValueError: features are not of unit length, or not as many as the shard has rows.
        """
        starts = self.layout.starts
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        vectors, positions = [], []
        for number in range(first, last + 1):
            low, high = max(start, int(starts[number])), min(stop, int(starts[number + 1]))
            if low >= high:
                continue
            rows = slice(low - int(starts[number]), high - int(starts[number]))
            part, present = self._part(number, rows)
            vectors.append(part[present])
            positions.append(low + np.flatnonzero(present))
        if not vectors:
            return np.zeros((0, 0), np.float16), np.zeros(0, np.int64)
        return np.concatenate(vectors), np.concatenate(positions)

    def missing(self) -> int:
        """How many rows that are in have no features."""
        missing = 0
        for number, shard in enumerate(self.layout.names):
            rows = slice(0, int(self.layout.starts[number + 1] - self.layout.starts[number]))
            missing += int((self.pool.kept(shard) & ~self._part(number, rows)[1]).sum())
        return missing

    def gather(self, positions: Positions) -> Vectors:
        """Features [N, D] at any positions, in that order."""
        numbers, rows = self.layout.locate(positions)
        gathered: Vectors | None = None
        for number in np.unique(numbers):
            features = self.pool.read_features(self.layout.names[number])
            if gathered is None:
                gathered = np.empty((len(positions), features.shape[1]), np.float16)
            here = numbers == number
            gathered[here] = features[rows[here]]
        return np.zeros((0, 0), np.float16) if gathered is None else gathered

    def _part(self, number: int, rows: slice) -> tuple[Vectors, npt.NDArray[np.bool_]]:
        """Features [n, D] of some rows of a shard, and which of them there are."""
        shard = self.layout.names[number]
        features = self.pool.read_features(shard)
        expected = int(self.layout.starts[number + 1] - self.layout.starts[number])
        if features.ndim != 2 or features.dtype != np.float16 or len(features) != expected:
            raise ValueError(
                f"features of shard {shard} must be float16 [{expected}, D], but are {features.dtype}"
                f" {list(features.shape)}"
            )
        part = np.asarray(features[rows])
        lengths = torch.linalg.vector_norm(torch.from_numpy(np.array(part)).float(), dim=1).numpy()
        finite = np.isfinite(lengths)
        if (off := np.abs(lengths[finite] - 1) > LENGTH_TOLERANCE).any():
            raise ValueError(
                f"features must have unit length or be NaN, but in shard {shard} {off.sum()} have another,"
                f" {lengths[finite][off][0]:.4g} the first"
            )
        return part, finite & self.pool.kept(shard)[rows]


def pair_cosines(
    vectors: Vectors, rows: Positions, others: PoolVectors, positions: Positions
) -> npt.NDArray[np.float32]:
    """Exact inner products [N] of ``vectors[rows]`` with a pool's features at ``positions``, shard by shard."""
    cosines = np.empty(len(rows), np.float32)
    order = np.argsort(positions, kind="stable")
    for start in range(0, len(order), CHUNK):
        chunk = order[start : start + CHUNK]
        cosines[chunk] = exact_cosines(vectors[rows[chunk]], others.gather(positions[chunk]))
    return cosines
