"""Shards, pools and sets without rows, or whose rows all went earlier: every stage takes them."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

from dinov2.curate import Pool, curate, run_steps
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.collect import CollectConfig
from dinov2.curate.dedup import DedupConfig, dedup
from dinov2.curate.engines import Inline
from dinov2.curate.materialize import NothingLeftError
from dinov2.curate.pipeline import EmptySetWarning
from dinov2.curate.pool import write_decisions
from dinov2.curate.report import write_report
from dinov2.curate.retrieve import RetrieveConfig, retrieve
from dinov2.curate.screen import ScreenConfig
from dinov2.curate.search import SearchConfig, search
from dinov2.curate.steps import Output, run_task
from dinov2.recipes import laptop
from tests.curate.pictures import encoded, picture
from tests.curate.test_download import write_links
from tests.curate.vector_pools import vector_pool

VECTORS = np.eye(6, 16, dtype=np.float16)
INDICES = ("flat", "ivf_sq8", "ivf_rabitq", "ivf_pq")
CUTS = {
    "the first, a middle and the last shard": (0, 3, 3, 6),
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
    config = SearchConfig(index=index, query_rows=3, index_rows=3)  # type: ignore[arg-type]
    other = vector_pool(tmp_path / "other", VECTORS)
    for queries, searched in ((pool, pool), (other, pool)):
        found = run_steps(search(queries, searched, config, str(tmp_path / "out"), stage="test", k=2), Inline())
        rows = [found.read(shard).row for shard in queries.shards()]
        assert sum(map(len, rows)) == left(queries) * min(2, left(searched) - (queries == searched))


def test_dedup(pool: Pool, tmp_path: Path) -> None:
    before, nothing = left(pool), vectors(tmp_path / "none", "all shards")
    everything = vector_pool(tmp_path / "all", VECTORS)
    for number, sets in enumerate(({"none": nothing}, {"none": nothing, "all": everything})):
        kept = run_steps(dedup(pool, sets, DedupConfig(), str(tmp_path / f"out{number}")), Inline())
        assert left(kept) == (0 if "all" in sets else before)


@pytest.mark.parametrize("method", ["sample", "cluster", "hierarchical"])
def test_retrieve(pool: Pool, tmp_path: Path, method: str) -> None:
    check_retrieval(pool, tmp_path, method, "no shard")


@pytest.mark.parametrize("seeds", ["the first, a middle and the last shard", "all shards", "no shard at all"])
def test_seeds(tmp_path: Path, seeds: str) -> None:
    for method in ("sample", "cluster"):
        check_retrieval(vectors(tmp_path / method, "no shard"), tmp_path / f"{method} 2", method, seeds)


def check_retrieval(pool: Pool, tmp_path: Path, method: str, seeds: str) -> None:
    config = RetrieveConfig(
        method=method,  # type: ignore[arg-type]
        min_seeds=1,
        clusters=ClusterConfig(clusters=3, levels=(2,), iterations=2, passes=1, resampling=1),
    )
    own = {"seeds": vectors(tmp_path / "seeds", seeds)}
    kept = run_steps(retrieve(pool, own, config, str(tmp_path / "out")), Inline())
    if method == "hierarchical":
        assert left(kept) == left(pool) // 2
    else:
        assert left(kept) == (left(pool) if left(own["seeds"]) else 0)


PICTURES = {
    "junk": [b"junk"],
    "cut": [encoded(picture(1))[:-200], encoded(picture(2))[:-200]],
    "tiny": [encoded(picture(3, 16, 16)), encoded(picture(4, 16, 16))],
    "good": [encoded(picture(5)), encoded(picture(6))],
    "seeds": [encoded(picture(7)), encoded(picture(8))],
    "test": [encoded(picture(9)), encoded(picture(10))],
}


def folder_of(root: Path, kinds: tuple[str, ...]) -> str:
    """A folder with the pictures of each kind, in this order."""
    root.mkdir()
    for number, content in enumerate(content for kind in kinds for content in PICTURES[kind]):
        (root / f"{number:02d}.png").write_bytes(content)
    return str(root)


@pytest.mark.parametrize(
    ("pool", "tests", "seeds", "method", "images"),
    [
        (("junk", "junk", "good"), None, None, "auto", 2),
        (("good", "junk", "junk"), ("junk",), None, "hierarchical", 1),
        (("cut", "good", "tiny"), ("cut",), ("seeds",), "sample", 2),
        (("tiny", "good"), ("test",), ("seeds", "junk"), "cluster", 2),
        (("good",), None, ("cut",), "cluster", 0),
        (("good",), ("good",), ("seeds",), "cluster", 0),
        (("junk", "junk"), ("test",), ("seeds",), "cluster", 0),
        (("cut", "tiny"), ("junk",), ("cut",), "hierarchical", 0),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_stage(
    pool: tuple[str, ...],
    tests: tuple[str, ...] | None,
    seeds: tuple[str, ...] | None,
    method: str,
    images: int,
    tmp_path: Path,
) -> None:
    """Shards of two files: some without an image, some whose images all go in the first stages, and sets like these."""
    recipe = laptop()
    config = dataclasses.replace(
        recipe,
        output=str(tmp_path / "out"),
        images=folder_of(tmp_path / "pool", pool),
        evaluation_sets=() if tests is None else (folder_of(tmp_path / "tests", tests),),
        seeds=() if seeds is None else (folder_of(tmp_path / "seeds", seeds),),
        collect=CollectConfig(shard_size=2),
        screen=ScreenConfig(faces="none"),
        retrieve=RetrieveConfig(
            method=method,  # type: ignore[arg-type]
            min_seeds=1,
            clusters=ClusterConfig(clusters=2, passes=1),
        ),
    )
    unusable = [
        name for name, kinds in (("evaluation_sets", tests), ("seeds", seeds)) if kinds in (("junk",), ("cut",))
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if images:
            kept = run_steps(curate(config), Inline(), tries=1).chosen
            assert left(kept) == images
        else:
            with pytest.raises(NothingLeftError, match="no image is left to write"):
                run_steps(curate(config), Inline(), tries=1)
        said = [str(entry.message) for entry in caught if entry.category is EmptySetWarning]
        text = Path(write_report(config)).read_text()
    assert [line.partition(":")[0] for line in said] == unusable
    assert all(line.partition(":")[0] in text for line in said)


def test_no_link_can_be_fetched(tmp_path: Path) -> None:
    links = write_links(tmp_path / "links", ["data:image/png;base64,xx", "ftp://x/y"])
    config = dataclasses.replace(laptop(), output=str(tmp_path / "out"), links=links, screen=ScreenConfig(faces="none"))
    with pytest.raises(NothingLeftError):
        run_steps(curate(config), Inline(), tries=1)
    assert "other scheme" in Path(write_report(config)).read_text()


def test_what_an_interrupted_task_left(tmp_path: Path) -> None:
    """Half-written files and an empty folder of a step: the report takes them, and the next run goes on."""
    config = dataclasses.replace(
        laptop(),
        output=str(tmp_path / "out"),
        images=folder_of(tmp_path / "pool", ("junk", "good")),
        collect=CollectConfig(shard_size=2),
        screen=ScreenConfig(faces="none"),
    )
    for step in curate(config):
        folder = Path(step.folder)
        for place in (".", "images", "index"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"{step.tasks[-1].shard}.tar.12345678.partial").write_bytes(b"half")
        if step.name == "screen-hashes":
            break
        for task in step.tasks:
            run_task(step.folder, task)
    assert "screen-measures" in Path(write_report(config)).read_text()
    assert left(run_steps(curate(config), Inline()).chosen) == 2
