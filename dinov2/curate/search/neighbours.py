"""What a search has found: a table for each shard of the queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.pool import read_table
from dinov2.curate.search.best import Pairs, best
from dinov2.curate.search.layout import Layout, read_layout
from dinov2.curate.steps import Counts, Output
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require


class Found(NamedTuple):
    """The neighbours of a shard's rows, ordered by row, then from the largest cosine down, equal ones by position.

    Attributes:
        row: of the query in its shard, int64 [N].
        neighbour: position in the pool that was searched, int64 [N].
        cosine: exact, rounded to float32, [N].
    """

    row: npt.NDArray[np.int64]
    neighbour: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """The result of a search; small, so that tasks may take it as an argument.

    Attributes:
        folder: of the tables ``SHARD.parquet`` with columns row, neighbour, cosine.
        queries: folder of the layout of the queries.
        searched: folder of the layout of what was searched; a position there is a neighbour.
    """

    folder: str
    queries: str
    searched: str

    def read(self, shard: str) -> Found:
        """The neighbours of a shard's rows."""
        table = read_table(self.folder, shard)
        return Found(*(table[name].to_numpy() for name in Found._fields))

    def query_layout(self) -> Layout:
        """Where the rows of the queries stand."""
        return read_layout(self.queries)

    def layout(self) -> Layout:
        """Where the rows of what was searched stand."""
        return read_layout(self.searched)


def write_pairs(output: Output, pairs: Iterator[Pairs]) -> None:
    """Write pairs of ascending queries, a row group for each part."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    schema = arrow.schema([("query", arrow.int64()), ("neighbour", arrow.int64()), ("cosine", arrow.float32())])
    with output.replace(".parquet") as file, parquet.ParquetWriter(file, schema) as writer:
        for part in pairs:
            writer.write_table(arrow.table(part._asdict(), schema))


def read_pairs(folder: str, name: str, start: int, stop: int) -> Pairs:
    """Pairs whose query lies from ``start`` to ``stop``; other row groups are not read."""
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    storage = Storage(folder)
    parts = []
    with storage.filesystem.open(f"{storage.root}/{name}.parquet", "rb") as opened:
        file = parquet.ParquetFile(opened)
        for number in range(file.metadata.num_row_groups):
            queries = file.metadata.row_group(number).column(0).statistics
            if queries is None or queries.max < start or queries.min >= stop:
                continue
            table = file.read_row_group(number, use_threads=False)
            part = Pairs(*(table[column].to_numpy() for column in Pairs._fields))
            parts.append(part.where((part.query >= start) & (part.query < stop)))
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else best([], 1)


def merge(output: Output, folder: str, names: tuple[str, ...], start: int, stop: int, k: int) -> Counts:
    """Task: the k nearest neighbours of a shard's rows, those from ``start`` to ``stop``, over all portions."""
    pairs = best([read_pairs(folder, name, start, stop) for name in names], k)
    output.write_table(Found(pairs.query - start, pairs.neighbour, pairs.cosine)._asdict())
    return Counts(stop - start, len(np.unique(pairs.query)), {}, {"pairs": len(pairs.query)})
