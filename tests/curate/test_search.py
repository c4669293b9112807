"""The search against brute force in float64, however the rows are cut, and what inverted files find of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import pytest
import torch

from dinov2.curate.engines import Engine, Inline, ProcessPool
from dinov2.curate.runner import FailedShardsError, run_steps
from dinov2.curate.search import Neighbours, SearchConfig, search
from dinov2.curate.search.flat import search_flat
from tests.curate.vector_pools import clustered_vectors, unit_vectors, vector_pool

Vectors = npt.NDArray[np.float16]
Triples = list[tuple[int, int, float]]


def brute_force(queries: Vectors, vectors: Vectors, k: int, threshold: float, own: bool) -> Triples:
    """(query, neighbour, cosine) by definition."""
    cosines = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    found = []
    for query, row in enumerate(cosines):
        order = np.lexsort((np.arange(len(row)), -row))
        near = [n for n in order if row[n] > np.float32(threshold) and not (own and n == query)]
        found += [(query, int(n), float(row[n])) for n in near[:k]]
    return found


def triples(result: Neighbours) -> Triples:
    layout, found = result.query_layout(), []
    for shard in layout.names:
        row, neighbour, cosine = result.read(shard)
        found += zip((row + layout.range_of(shard)[0]).tolist(), neighbour.tolist(), cosine.tolist(), strict=True)
    return found


def self_search(root: Path, vectors: Vectors, config: SearchConfig, k: int, threshold: float) -> Triples:
    pool = vector_pool(root / "pool", vectors)
    result = run_steps(search(pool, pool, config, str(root / "out"), stage="test", k=k, threshold=threshold), Inline())
    return triples(result)


@pytest.mark.parametrize("rough", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["clusters", "ties", "all equal"])
@pytest.mark.parametrize(("k", "threshold"), [(5, -2.0), (5, 0.5), (3000, 0.5), (64, 0.9)])
def test_flat_search_is_brute_force(rough: torch.dtype, case: str, k: int, threshold: float) -> None:
    vectors = clustered_vectors(2300, 24, 60, 0.8, seed=1)  # more than one tile
    if case == "ties":
        vectors = vectors[np.random.default_rng(2).integers(90, size=2300)]
    if case == "all equal":
        vectors = np.repeat(vectors[:1], 2300, axis=0)
    queries = vectors[700:760]
    portions = [(vectors[:1000], np.arange(1000)), (vectors[1000:], np.arange(1000, 2300))]
    found = search_flat(queries, None, portions, k, threshold, rough)
    expected = brute_force(queries, vectors, k, threshold, own=False)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected


def test_no_row_is_its_own_neighbour(tmp_path: Path) -> None:
    vectors = clustered_vectors(300, 16, 20, 0.5, seed=3)
    vectors[100:200] = vectors[:100]
    assert self_search(tmp_path, vectors, SearchConfig(), 4, 0.6) == brute_force(vectors, vectors, 4, 0.6, own=True)


def test_few_rows_and_empty_shards(tmp_path: Path) -> None:
    vectors = unit_vectors(np.random.default_rng(4).standard_normal((5, 8)))
    pool = vector_pool(tmp_path / "pool", vectors, cuts=(0, 2, 2, 5))
    result = run_steps(search(pool, pool, SearchConfig(), str(tmp_path / "out"), stage="test", k=64), Inline())
    assert triples(result) == brute_force(vectors, vectors, 64, -2, own=True)
    empty = vector_pool(tmp_path / "empty", vectors[:0])
    for queries, searched in [(empty, pool), (pool, empty), (empty, empty)]:
        steps = search(queries, searched, SearchConfig(), str(tmp_path / "out"), stage="test", k=64)
        assert triples(run_steps(steps, Inline())) == []


@pytest.mark.parametrize("index", ["flat", "ivf_sq8"])
def test_rows_that_are_out_or_have_no_features_are_ignored(tmp_path: Path, index: str) -> None:
    vectors = clustered_vectors(400, 16, 4, 0.3, seed=5)
    vectors[::7] = np.nan
    pool = vector_pool(tmp_path / "pool", vectors, cuts=(150,))
    keep = np.ones(400, bool)
    keep[::5] = False
    (tmp_path / "decisions").mkdir()
    for number, part in enumerate(np.split(keep, (150,))):
        pyarrow.parquet.write_table(pyarrow.table({"keep": part}), tmp_path / f"decisions/{number:05d}.parquet")
    pool = pool.after(str(tmp_path / "decisions"))
    config = SearchConfig(index=index, probes=1000)
    result = run_steps(search(pool, pool, config, str(tmp_path / "out"), stage="test", k=3, threshold=0.2), Inline())
    present = np.flatnonzero(keep & np.isfinite(vectors[:, 0]))
    expected = brute_force(vectors[present], vectors[present], 3, 0.2, own=True)
    assert triples(result) == [(int(present[q]), int(present[n]), cosine) for q, n, cosine in expected]


@pytest.mark.parametrize("index", ["flat", "ivf_sq8", "ivf_rabitq", "ivf_pq"])
def test_engines_portions_of_queries_and_shards_change_nothing(tmp_path: Path, index: str) -> None:
    vectors = clustered_vectors(3000, 64, 150, 0.7, seed=6)
    queries = vector_pool(tmp_path / "queries", vectors[::4], cuts=(100, 350))
    whole = vector_pool(tmp_path / "whole", vectors)
    config = SearchConfig(index=index, index_rows=1600, query_rows=300, lists=16, probes=4)

    def run(name: str, engine: Engine, config: SearchConfig, cuts: tuple[int, ...] | None = None) -> Triples:
        pool = whole if cuts is None else vector_pool(tmp_path / name / "pool", vectors, cuts)
        steps = search(queries, pool, config, str(tmp_path / name), stage="test", k=6, threshold=0.3)
        return triples(run_steps(steps, engine))

    first = run("first", Inline(), config)
    if index == "ivf_sq8":
        assert first == run("processes", ProcessPool(2), config)
        files = {path.relative_to(tmp_path / "first"): path for path in (tmp_path / "first").glob("*/*.*")}
        assert len(files) > 15
        for relative, path in files.items():
            assert path.read_bytes() == (tmp_path / "processes" / relative).read_bytes(), relative
    assert first == run("shards", Inline(), config, (7, 900, 1500, 1501, 2000, 2999))
    assert first == run("queries", Inline(), dataclasses.replace(config, query_rows=10_000))
    exact = brute_force(vectors[::4], vectors, 6, 0.3, own=False)
    if index == "flat":
        assert first == exact
    else:  # what is found is exact, and nearly all that there is
        assert len(first) > 0.95 * len(exact)
        assert len(set(first) & set(exact)) > 0.95 * len(exact)


def test_memory_as_storage(tmp_path: Path) -> None:
    vectors = clustered_vectors(500, 16, 30, 0.5, seed=7)
    pool = vector_pool(tmp_path / "pool", vectors, cuts=(200,))
    config = SearchConfig(index="ivf_sq8", probes=1000)
    result = run_steps(search(pool, pool, config, f"memory://{tmp_path}", stage="test", k=3, threshold=0.5), Inline())
    assert triples(result) == brute_force(vectors, vectors, 3, 0.5, own=True)


def test_automatic_choice_of_the_index() -> None:
    config = SearchConfig()
    assert [config.kind(rows) for rows in (0, 999_999, 1_000_000)] == ["flat", "flat", "ivf_rabitq"]


def test_what_is_no_unit_vector_is_refused(tmp_path: Path) -> None:
    pool = vector_pool(tmp_path / "pool", np.full((3, 4), 2, np.float16))
    with pytest.raises(FailedShardsError, match="features of shard 00000: expected unit length or NaN, got 3 rows"):
        run_steps(search(pool, pool, SearchConfig(), str(tmp_path / "out"), stage="test", k=1), Inline(), tries=1)


def test_arguments_are_checked(tmp_path: Path) -> None:
    pool = vector_pool(tmp_path / "pool", np.ones((1, 1), np.float16))
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        next(search(pool, pool, SearchConfig(), str(tmp_path), stage="test", k=0))
    with pytest.raises(ValueError, match="queries: expected features"):
        next(search(dataclasses.replace(pool, features=None), pool, SearchConfig(), str(tmp_path), stage="test", k=1))
    with pytest.raises(ValueError, match=r"search.index: expected one of auto, flat, .* got 'hnsw'"):
        SearchConfig(index="hnsw")
    with pytest.raises(ValueError, match=r"search\.index_rows: expected at least 1, got 0"):
        SearchConfig(index_rows=0)
