"""The search as steps: it compares portions of queries with portions of a pool and writes neighbours by shard."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.pool import Pool, read_table
from dinov2.curate.search import inverted
from dinov2.curate.search.flat import Pairs, best, search_flat
from dinov2.curate.search.inverted import search_inverted
from dinov2.curate.search.vectors import Layout, PoolVectors, Positions, SearchConfig, Vectors, layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

SLICE = 16_384  # searched rows in memory at once without an index


class Found(NamedTuple):
    """The neighbours of a shard's rows, sorted by row, then by descending cosine, then by position.

    Attributes:
        row: row of the query in its shard, int64 [N].
        neighbour: position in the pool that was searched, int64 [N].
        cosine: exact cosine, rounded to float32 [N].
    """

    row: npt.NDArray[np.int64]
    neighbour: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """The result of a search, as paths: small enough to be an argument of tasks.

    Attributes:
        folder: folder of the tables ``SHARD.parquet`` with columns row, neighbour, cosine.
        queries: folder of the layout of the queries.
        searched: folder of the layout of the searched pool; neighbours are positions in it.
    """

    folder: str
    queries: str
    searched: str

    def read(self, shard: str) -> Found:
        """Read the neighbours of a shard's rows."""
        table = read_table(self.folder, shard)
        return Found(*(table[name].to_numpy() for name in Found._fields))

    def query_layout(self) -> Layout:
        """The layout of the queries."""
        return read_layout(self.queries)

    def layout(self) -> Layout:
        """The layout of the searched pool."""
        return read_layout(self.searched)


@dataclass(frozen=True)
class _Search:
    """The arguments that all tasks of a search share; see :func:`search`."""

    queries: Pool
    query_rows: str
    pool: Pool
    pool_rows: str
    config: SearchConfig
    kind: str
    k: int
    threshold: float

    def folders(self) -> tuple[str, ...]:
        pools = (self.queries, self.pool)
        features = [pool.features for pool in pools if pool.features is not None]
        return (self.query_rows, self.pool_rows, *features, *self.queries.decisions, *self.pool.decisions)


def search(
    queries: Pool,
    pool: Pool,
    config: SearchConfig,
    output: str,
    *,
    stage: str,
    k: int,
    threshold: float = -2.0,
) -> Steps[Neighbours]:
    """Find, for each row of one pool, the k nearest rows of another by the inner product of their features.

    Rows that are out, or whose features are NaN, are no queries and no neighbours. If both pools are the same, no row
    is its own neighbour. Cosines are exact (:func:`~dinov2.curate.search.vectors.exact_cosines`); with a flat index the
    neighbours are exact too. Among equals, lower positions come first. Results do not depend on threads, engines or the
    order of tasks. For a given order of rows, they do not depend on the cut into shards either.

    Args:
        queries: pool of the queries, with features.
        pool: pool that is searched, with features of the same kind.
        config: index and portions.
        output: folder or URL of the whole curation.
        stage: first part of the steps' names.
        k: largest number of neighbours of a row.
        threshold: only neighbours with a larger cosine are written.

    Returns:
        The neighbours, after all steps have run.

    Raises:
        ValueError: an argument is out of its range, or a pool has no features.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    for name, given in (("queries", queries), ("pool", pool)):
        if given.features is None:
            raise ValueError(f"{name}: expected features, got none: embed it first")
    query_rows = yield from layout_of(queries, stage, output)
    pool_rows = query_rows if pool == queries else (yield from layout_of(pool, stage, output))
    layout, query_layout = read_layout(pool_rows), read_layout(query_rows)
    kind = config.kind(math.isqrt(layout.rows * query_layout.rows))
    job = _Search(queries, query_rows, pool, pool_rows, config, kind, k, threshold)
    blocks = layout.blocks(config.index_rows)
    built = None if kind == "flat" else (yield from _build(job, blocks, output, stage))
    groups = query_layout.groups(config.query_rows)
    tasks = tuple(
        Task(
            _name(i, j),
            _search,
            (job, (query_layout.range_of(group[0])[0], query_layout.range_of(group[-1])[1]), block, built, _name(j)),
        )
        for i, group in enumerate(groups)
        for j, block in enumerate(blocks)
    )
    inputs = (*job.folders(), *([] if built is None else [built]))
    pairs = Step(output, f"{stage}-pairs", [config, kind, k, threshold], inputs, tasks, "queries", gpu=True)
    yield pairs
    merges = []
    for i, group in enumerate(groups):
        names = tuple(_name(i, j) for j in range(len(blocks)))
        merges += [Task(shard, merge, (pairs.folder, names, *query_layout.range_of(shard), k)) for shard in group]
    merged = Step(output, f"{stage}-neighbours", k, (pairs.folder,), tuple(merges))
    yield merged
    return Neighbours(merged.folder, query_rows, pool_rows)


def _build(job: _Search, blocks: list[tuple[int, int]], output: str, stage: str) -> Steps[str]:
    """Train an inverted file, then build one for each block. The value is the folder of the inverted files."""
    require("faiss", extra="curate", purpose="approximate search")
    settings = [job.config, job.kind]
    train = Task("all", inverted.train, (job.pool, job.pool_rows, job.config, job.kind))
    trained = Step(output, f"{stage}-lists", settings, job.folders(), (train,))
    yield trained
    tasks = tuple(
        Task(_name(j), inverted.build, (job.pool, job.pool_rows, trained.folder, *block))
        for j, block in enumerate(blocks)
    )
    built = Step(output, f"{stage}-index", settings, (trained.folder,), tasks)
    yield built
    return built.folder


def _search(
    output: Output, job: _Search, asking: tuple[int, int], block: tuple[int, int], built: str | None, index: str
) -> Counts:
    """Task: find the neighbours of a group of queries in a block of the searched pool."""
    queries = PoolVectors(job.queries, read_layout(job.query_rows))
    others = PoolVectors(job.pool, read_layout(job.pool_rows))
    counts = Counts()

    def found() -> Iterator[Pairs]:
        nonlocal counts
        for start in range(*asking, job.config.query_rows):
            stop = min(start + job.config.query_rows, asking[1])
            vectors, positions = queries.block(start, stop)
            own = positions if job.queries == job.pool else None
            if built is None:
                pairs = search_flat(vectors, own, _portions(others, *block), job.k, job.threshold)
            else:
                pairs = search_inverted(
                    vectors, own, others, (built, index), job.k, job.threshold, job.config, job.kind
                )
            counts += Counts(len(vectors), len(np.unique(pairs.query)), {}, {"pairs": len(pairs.query)})
            pairs = pairs._replace(query=positions[pairs.query])
            starts = queries.layout.starts
            cuts = np.searchsorted(pairs.query, starts[(starts > start) & (starts < stop)])
            yield from (Pairs(*part) for part in zip(*(np.split(column, cuts) for column in pairs), strict=True))

    write_pairs(output, found())
    return counts


def _portions(others: PoolVectors, start: int, stop: int) -> Iterator[tuple[Vectors, Positions]]:
    for low in range(start, stop, SLICE):
        vectors, positions = others.block(low, min(low + SLICE, stop))
        if len(vectors):
            yield vectors, positions


def _name(*numbers: int) -> str:
    return "-".join(f"{number:05d}" for number in numbers)


def write_pairs(output: Output, pairs: Iterator[Pairs]) -> None:
    """Write pairs with ascending queries, one row group for each part."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    schema = arrow.schema([("query", arrow.int64()), ("neighbour", arrow.int64()), ("cosine", arrow.float32())])
    with output.replace(".parquet") as file, parquet.ParquetWriter(file, schema) as writer:
        for part in pairs:
            writer.write_table(arrow.table(part._asdict(), schema))


def read_pairs(folder: str, name: str, start: int, stop: int) -> Pairs:
    """Read the pairs whose query is from ``start`` to ``stop``. Other row groups are not read."""
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
    """Task: merge the k nearest neighbours of a shard's rows, from ``start`` to ``stop``, over all portions."""
    pairs = best([read_pairs(folder, name, start, stop) for name in names], k)
    output.write_table(Found(pairs.query - start, pairs.neighbour, pairs.cosine)._asdict())
    return Counts(stop - start, len(np.unique(pairs.query)), {}, {"pairs": len(pairs.query)})
