"""Where each row of a pool stands in the row of all rows: one integer for a shard and a row in it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2.curate.pool import Pool, read_table
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """The rows of all shards of a pool, numbered through in the order of the shards' names.

    Position ``starts[i] + r`` is row r of shard ``names[i]``: its global id.

    Attributes:
        names: of the shards [S], sorted.
        starts: position of the first row of each, and behind the last the number of rows; int64 [S + 1].
    """

    names: tuple[str, ...]
    starts: Positions

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.starts[-1])

    def range_of(self, shard: str) -> tuple[int, int]:
        """First position of a shard, and the first one behind it."""
        number = int(np.searchsorted(np.asarray(self.names), shard))
        if number == len(self.names) or self.names[number] != shard:
            raise ValueError(f"shard must be one of the pool's {len(self.names)}, but is {shard!r}")
        return int(self.starts[number]), int(self.starts[number + 1])

    def locate(self, positions: Positions) -> tuple[Positions, Positions]:
        """Number of the shard and row in it of positions [N]."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        return numbers, positions - self.starts[numbers]

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """All positions in ranges of ``rows``, the last one shorter."""
        return [(start, min(start + rows, self.rows)) for start in range(0, self.rows, rows)]

    def groups(self, rows: int) -> list[tuple[str, ...]]:
        """All shards in runs of about ``rows`` rows: whole shards, one at least."""
        runs = self.starts[:-1] // rows
        cuts = [0, *(np.flatnonzero(np.diff(runs)) + 1).tolist(), len(self.names)]
        return [self.names[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def layout_of(pool: Pool, stage: str, output: str) -> Steps[str]:
    """Count the rows of a pool's shards; gives the folder that :func:`read_layout` reads."""
    task = Task("all", _write_layout, (pool.images,))
    step = Step(output, f"{stage}-rows", pool.fingerprint(), (pool.images,), (task,))
    yield step
    return step.folder


def read_layout(folder: str) -> Layout:
    """What :func:`layout_of` has counted."""
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
