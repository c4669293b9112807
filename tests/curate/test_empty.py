"""Shards, pools and sets without rows, or whose rows all went earlier: every stage takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinov2.curate import Pool, run_steps
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.dedup import DedupConfig, dedup
from dinov2.curate.engines import Inline
from dinov2.curate.pool import write_decisions
from dinov2.curate.retrieve import RetrieveConfig, retrieve
from dinov2.curate.search import SearchConfig, search
from dinov2.curate.steps import Output
from tests.curate.vector_pools import vector_pool

VECTORS = np.eye(6, 16, dtype=np.float16)
INDICES = ("flat", "ivf_sq8", "ivf_rabitq", "ivf_pq")
CUTS = {
    "the first shard": (0, 3),
    "a middle shard": (3, 3),
    "the last shard": (3, 6),
    "all shards": (0, 0, 6),
    "no shard": (2, 4),
}


def vectors(root: Path, empty: str) -> Pool:
    """A pool of six vectors, or of none, of which some shards are empty."""
    if empty == "no shard at all":
        (root / "features").mkdir(parents=True)
        return Pool(str(root), features=str(root / "features"))
    if empty == "all shards":
        return vector_pool(root, VECTORS[:0], cuts=(0,))
    return vector_pool(root, VECTORS, cuts=CUTS[empty])


def without(pool: Pool, root: Path, shards: set[str]) -> Pool:
    """The pool, after a step that dropped all rows of some shards."""
    for shard in pool.shards():
        rows = len(pool.index(shard, ["size"]))
        reason = "gone" if shard in shards else None
        write_decisions(Output(str(root), shard), [reason] * rows, np.ones(rows, dtype=bool))
    return pool.after(str(root))


POOLS = [*CUTS, "no shard at all", "first dropped", "all dropped"]


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    name = str(request.param)
    if not name.endswith("dropped"):
        return vectors(tmp_path / "pool", name)
    whole = vectors(tmp_path / "pool", "no shard")
    return without(whole, tmp_path / "gone", {"00000"} if name == "first dropped" else set(whole.shards()))


def left(pool: Pool) -> int:
    return sum(int(pool.kept(shard).sum()) for shard in pool.shards())


@pytest.mark.parametrize("index", INDICES)
def test_search(pool: Pool, tmp_path: Path, index: str) -> None:
    config = SearchConfig(index=index, query_rows=2, index_rows=2)  # type: ignore[arg-type]
    other = vector_pool(tmp_path / "other", VECTORS)
    for queries, searched in ((pool, pool), (pool, other), (other, pool)):
        found = run_steps(search(queries, searched, config, str(tmp_path / "out"), stage="test", k=2), Inline())
        rows = [found.read(shard).row for shard in queries.shards()]
        assert sum(map(len, rows)) == left(queries) * min(2, left(searched) - (queries == searched))


def test_dedup(pool: Pool, tmp_path: Path) -> None:
    before, nothing = left(pool), vectors(tmp_path / "none", "all shards")
    for number, sets in enumerate(
        ({}, {"none": nothing}, {"none": nothing, "all": vector_pool(tmp_path / "all", VECTORS)})
    ):
        kept = run_steps(dedup(pool, sets, DedupConfig(), str(tmp_path / f"out{number}")), Inline())
        assert left(kept) == (0 if "all" in sets else before)


@pytest.mark.parametrize("method", ["auto", "sample", "cluster", "hierarchical"])
def test_retrieve(pool: Pool, tmp_path: Path, method: str) -> None:
    check_retrieval(pool, tmp_path, method, "no shard")


@pytest.mark.parametrize("seeds", ["the last shard", "all shards", "no shard at all"])
def test_seeds(tmp_path: Path, seeds: str) -> None:
    for method in ("sample", "cluster"):
        check_retrieval(vectors(tmp_path / method, "no shard"), tmp_path / f"{method} 2", method, seeds)


def check_retrieval(pool: Pool, tmp_path: Path, method: str, seeds: str) -> None:
    config = RetrieveConfig(
        method=method,  # type: ignore[arg-type]
        min_seeds=1,
        clusters=ClusterConfig(clusters=3, levels=(2,)),
    )
    own = {"seeds": vectors(tmp_path / "seeds", seeds)}
    kept = run_steps(retrieve(pool, own, config, str(tmp_path / "out")), Inline())
    if method == "hierarchical":
        assert left(kept) == left(pool) // 2
    else:
        assert left(kept) == (left(pool) if left(own["seeds"]) else 0)
