"""The inputs of a search: its settings, the position of each row of a pool, and features in portions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov2.configuration import Config, Count, CountOr0
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

Positions = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float16]

CHUNK = 8192  # pairs whose vectors are in memory at once

LENGTH_TOLERANCE = 0.02  # allowed error of unit length; float16 rounds the length of a long vector by 0.0005


@dataclass(frozen=True)
class SearchConfig(Config, at="search"):
    """How neighbours are looked for, and in which portions."""

    index: Literal["auto", "flat", "ivf_sq8", "ivf_rabitq", "ivf_pq"] = "auto"
    """flat compares everything with everything and is exact. The others look into the nearest lists of an inverted file
    only and compare what they find again exactly; a vector takes 8 bits a dimension (ivf_sq8), 1 bit a dimension
    (ivf_rabitq), or 64 bytes (ivf_pq). auto takes flat, or ivf_rabitq where there are many rows to search."""
    exact_below: CountOr0 = 1_000_000
    """auto takes flat for fewer rows than this. Where there are fewer queries than rows to search, the square root of
    the number of pairs counts."""
    lists: CountOr0 = 0
    """An inverted file has this many lists. 0 takes the power of two nearest to 4 sqrt(index_rows), or less where there
    are fewer vectors to train on."""
    probes: CountOr0 = 0
    """Each query looks into this many lists. 0 looks into one in 64, and 16 at least."""
    query_rows: Count = 50_000
    """A portion of queries has this many rows, rounded to whole shards. A task takes one portion of each side."""
    index_rows: Count = 500_000
    """A portion of what is searched has this many rows. An inverted file holds one portion."""
    seed: CountOr0 = 0
    """This seed decides which vectors inverted files are trained on."""

    def kind(self, rows: int) -> str:
        """The kind of index. ``auto`` is decided by the number of rows; see ``exact_below``."""
        if self.index != "auto":
            return self.index
        return "flat" if rows < self.exact_below else "ivf_rabitq"

    def number_of_lists(self, rows: int) -> int:
        """The number of lists of inverted files over ``rows`` rows in all."""
        portion = max(min(rows, self.index_rows), 1)
        return self.lists or 2 ** max(round(math.log2(4 * math.sqrt(portion))), 0)

    def number_of_probes(self, lists: int) -> int:
        """The number of lists, out of ``lists``, that a query looks into."""
        return min(self.probes or max(16, lists // 64), lists)


@dataclass(frozen=True)
class Layout:
    """Positions: the rows of all shards of a pool, numbered in the order of the shards' names.

    Position ``starts[i] + r`` is row r of shard ``names[i]``.

    Attributes:
        names: sorted names of the shards [S].
        starts: position of the first row of each shard, then the number of all rows; int64 [S + 1].
    """

    names: tuple[str, ...]
    starts: Positions

    @property
    def rows(self) -> int:
        """The number of all rows."""
        return int(self.starts[-1])

    def range_of(self, shard: str) -> tuple[int, int]:
        """The first position of a shard, and the first position after it."""
        number = int(np.searchsorted(np.asarray(self.names), shard))
        if number == len(self.names) or self.names[number] != shard:
            raise ValueError(f"shard: expected one of the pool's {len(self.names)} shards, got {shard!r}")
        return int(self.starts[number]), int(self.starts[number + 1])

    def locate(self, positions: Positions) -> tuple[Positions, Positions]:
        """The number of the shard, and the row in it, of each position [N]."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        return numbers, positions - self.starts[numbers]

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """All positions in ranges of ``rows``; the last range may be shorter."""
        return [(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    def groups(self, rows: int) -> list[tuple[str, ...]]:
        """All shards in groups of about ``rows`` rows. A group has whole shards, at least one."""
        runs = self.starts[:-1] // rows
        cuts = [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(self.names)]
        return [self.names[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def layout_of(pool: Pool, stage: str, output: str) -> Steps[str]:
    """Count the rows of a pool's shards. The value is the folder that :func:`read_layout` reads."""
    task = Task("all", _write_layout, (pool.images,))
    step = Step(output, f"{stage}-rows", pool.fingerprint(), pool.inputs, (task,))
    yield step
    return step.folder


def read_layout(folder: str) -> Layout:
    """Read the layout that :func:`layout_of` wrote."""
    table = read_table(folder, "all")
    ends = np.cumsum(table["rows"].to_numpy(), dtype=np.int64)
    return Layout(tuple(table["shard"].to_pylist()), np.concatenate([np.zeros(1, np.int64), ends]))


def _write_layout(output: Output, images: str) -> Counts:
    arrow = require("pyarrow", extra="curate", purpose="curation")
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    storage = Storage(images)
    names, rows = [], []
    for name, path in storage.indices().items():
        with storage.filesystem.open(path, "rb") as file:
            names.append(name)
            rows.append(parquet.ParquetFile(file).metadata.num_rows)
    output.write_table({"shard": arrow.array(names, arrow.string()), "rows": np.array(rows, dtype=np.int64)})
    return Counts(sum(rows), sum(rows))


def exact_cosines(first: Vectors, second: Vectors) -> npt.NDArray[np.float32]:
    """Inner products [N] of unit vectors [N, D] and [N, D], rounded only once, to float32.

    Finite float16 numbers are multiples of 2^-24, so their products are multiples of 2^-48. float32 holds a product
    without an error, and float64 holds a sum of products without an error if it is below 32. The result is the same
    bits on every machine, in any order of summation.
    """
    import torch

    products = torch.from_numpy(first).float() * torch.from_numpy(second).float()
    cosines: npt.NDArray[np.float32] = products.sum(1, dtype=torch.float64).float().numpy()
    return cosines


class PoolVectors:
    """The features of the rows of a pool that are still in.

    Args:
        pool: images with features.
        layout: positions of the pool's rows.
    """

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self.pool = pool
        self.layout = layout

    def block(self, start: int, stop: int) -> tuple[Vectors, Positions]:
        """Features [N, D] and positions [N] from start to stop, without rows that are out or have no features.

        Raises:
            ValueError: features are not of unit length, or their number differs from the shard's rows.
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
        """The number of rows that are in but have no features."""
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
        """Features [n, D] of some rows of a shard, and which of the rows are in and have features."""
        import torch

        shard = self.layout.names[number]
        features = self.pool.read_features(shard)
        expected = int(self.layout.starts[number + 1] - self.layout.starts[number])
        if features.ndim != 2 or features.dtype != np.float16 or len(features) != expected:
            raise ValueError(
                f"features of shard {shard}: expected float16 [{expected}, D], got {features.dtype}"
                f" {list(features.shape)}"
            )
        part = np.asarray(features[rows])
        lengths = torch.linalg.vector_norm(torch.from_numpy(np.array(part)).float(), dim=1).numpy()
        finite = np.isfinite(lengths)
        if (off := np.abs(lengths[finite] - 1) > LENGTH_TOLERANCE).any():
            raise ValueError(
                f"features of shard {shard}: expected unit length or NaN, got {off.sum()} rows of another length,"
                f" the first of {lengths[finite][off][0]:.4g}"
            )
        return part, finite & self.pool.kept(shard)[rows]


def width_of(pool: Pool, layout: Layout) -> int:
    """The dimension of a pool's features; 1 for a pool without shards."""
    return int(pool.read_features(layout.names[0]).shape[1]) if layout.names else 1


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
