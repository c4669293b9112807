"""Search by inverted files of Faiss. They are trained once, built portion by portion, and memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.engines import single_thread
from dinov2.curate.pool import Pool
from dinov2.curate.search.flat import Pairs, best
from dinov2.curate.search.vectors import (
    PoolVectors,
    Positions,
    SearchConfig,
    Vectors,
    pair_cosines,
    read_layout,
    width_of,
)
from dinov2.curate.steps import Counts, Output
from dinov2.data.shards.storage import RangeReader, Storage
from dinov2.extras import require

SUFFIX = ".faiss"
QUERIES = 4096  # queries searched at once
LEAST = 256  # fewest candidates of a query, because codes may not rank the nearest one first
PER_LIST = 48  # training vectors for each list; Faiss asks for at least 39
VALUES = 256  # of a byte
FOR_CODES = 12_288  # training vectors for codes: 48 for each of the 256 values of a byte


class Code(NamedTuple):
    """How an inverted file stores vectors.

    Attributes:
        error: usual largest error of the product of a query with a stored vector. Candidates further below the
            threshold than this are not compared again.
        more: number of candidates as a multiple of k, because codes give only a rough order.
    """

    error: float
    more: int


CODES = {"ivf_sq8": Code(0.02, 2), "ivf_rabitq": Code(0.15, 4), "ivf_pq": Code(0.15, 4)}


@contextmanager
def faiss_module() -> Iterator[Any]:
    """Faiss, limited to one thread."""
    faiss = require("faiss", extra="curate", purpose="approximate search")
    with single_thread():
        yield faiss


def train(output: Output, pool: Pool, layout_folder: str, config: SearchConfig, kind: str) -> Counts:
    """Task: train an empty inverted file on a sample of the pool. The sample does not depend on the cut into shards."""
    layout = read_layout(layout_folder)
    lists = config.number_of_lists(layout.rows)
    wanted = max(PER_LIST * lists, FOR_CODES)
    size = min(layout.rows, 2 * wanted)  # twice as many as wanted, because some may be out
    drawn = np.random.default_rng(config.seed).choice(layout.rows, size, replace=False, shuffle=False)
    sample = _sample(PoolVectors(pool, layout), np.sort(drawn), wanted)  # [S, D]
    counts = Counts(len(drawn), len(sample), {}, {"more than needed, or without features": len(drawn) - len(sample)})
    if not len(sample):  # an index of nothing is trained on anything
        sample = np.zeros((1, width_of(pool, layout)), np.float32)
    if kind == "ivf_pq" and len(sample) < VALUES:  # Faiss refuses to train these codes on fewer vectors
        sample = np.resize(sample, (VALUES, sample.shape[1]))
    with faiss_module() as faiss:
        index = _empty(faiss, kind, sample.shape[1], min(lists, max(counts.rows_out // PER_LIST, 1)))
        for clustering in [index.cp, *([index.pq.cp] if kind == "ivf_pq" else [])]:
            clustering.min_points_per_centroid = 1  # without this Faiss warns about small pools
        index.train(sample)
        _write(faiss, index, output)
    return counts


def build(output: Output, pool: Pool, layout_folder: str, trained: str, start: int, stop: int) -> Counts:
    """Task: build the inverted file of the rows from position ``start`` to ``stop``."""
    others = PoolVectors(pool, read_layout(layout_folder))
    added = 0
    with faiss_module() as faiss:
        index = _read(faiss, trained, "all", mapped=False)
        for low in range(start, stop, 10 * QUERIES):
            vectors, positions = others.block(low, min(low + 10 * QUERIES, stop))
            if len(vectors):
                index.add_with_ids(vectors.astype(np.float32), positions)
                added += len(vectors)
        _write(faiss, index, output)
    return Counts(stop - start, added, {"out, or without features": stop - start - added})


def search_inverted(
    queries: Vectors,
    own: Positions | None,
    others: PoolVectors,
    file: tuple[str, str],
    k: int,
    threshold: float,
    config: SearchConfig,
    kind: str,
) -> Pairs:
    """Like :func:`~dinov2.curate.search.flat.search_flat`, but searches only the nearest lists of an inverted file.

    Products by the file's codes are rough. Candidates that may be above the threshold are compared again exactly.
    """
    code = CODES[kind]
    parts = []
    with faiss_module() as faiss:
        index = _on_gpu(faiss, _read(faiss, *file, mapped=True))
        index.nprobe = config.number_of_probes(index.nlist)
        for start in range(0, len(queries), QUERIES):
            block = queries[start : start + QUERIES].astype(np.float32)
            wanted = min(max(code.more * k, LEAST) + (own is not None), max(index.ntotal, 1))
            rough, found = index.search(block, wanted)  # [Q, wanted] each; -1 fills missing candidates
            query, slot = np.nonzero((found >= 0) & (rough > threshold - code.error))
            parts.append(Pairs(query + start, found[query, slot], rough[query, slot]))
    pairs = Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else best([], k)
    if own is not None:
        pairs = pairs.where(own[pairs.query] != pairs.neighbour)
    pairs = pairs._replace(cosine=pair_cosines(queries, pairs.query, others, pairs.neighbour))
    return best([pairs.where(pairs.cosine > np.float32(threshold))], k)


def _sample(vectors: PoolVectors, positions: Positions, wanted: int) -> npt.NDArray[np.float32]:
    """Features [S, D] at positions that have features, spread evenly over the pool, S <= wanted."""
    numbers, _ = vectors.layout.locate(positions)
    parts = []
    for number in np.unique(numbers):
        start, stop = vectors.layout.starts[number], vectors.layout.starts[number + 1]
        block, present = vectors.block(int(start), int(stop))
        parts.append(block[np.isin(present, positions[numbers == number])])
    sample = np.concatenate([part for part in parts if len(part)] or [np.zeros((0, 1), np.float16)])
    chosen = np.linspace(0, len(sample), min(wanted, len(sample)), endpoint=False).astype(np.int64)
    return sample[chosen].astype(np.float32)


def _empty(faiss: Any, kind: str, dimensions: int, lists: int) -> Any:
    bytes_each = max(size for size in range(1, 65) if dimensions % size == 0 and (size == 1 or dimensions >= 4 * size))
    codes = {"ivf_sq8": "SQ8", "ivf_rabitq": "RaBitQ", "ivf_pq": f"PQ{bytes_each}np"}  # np: without Hamming distances
    return faiss.index_factory(dimensions, f"IVF{lists},{codes[kind]}", faiss.METRIC_INNER_PRODUCT)


def _write(faiss: Any, index: Any, output: Output) -> None:
    with output.replace(SUFFIX) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _read(faiss: Any, folder: str, name: str, *, mapped: bool) -> Any:
    """Read an index: memory-mapped from a local disk, so that lists are read when needed, or as a whole into memory."""
    storage = Storage(folder)
    path = f"{storage.root}/{name}{SUFFIX}"
    if RangeReader(storage.filesystem).is_local:
        return faiss.read_index(path, faiss.IO_FLAG_MMAP if mapped else 0)
    with storage.filesystem.open(path, "rb") as file:
        return faiss.read_index(faiss.PyCallbackIOReader(file.read))


def _on_gpu(faiss: Any, index: Any) -> Any:
    """Move the index to a GPU if Faiss has one and supports this kind there."""
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        return index
    try:
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    except RuntimeError:
        return index
