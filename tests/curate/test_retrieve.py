"""What seeds ask for: as comparing all with all finds it, and so many of each cluster."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from dinov2.curate import Pool, run_steps
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.pool import read_table, write_decisions
from dinov2.curate.retrieve import RetrieveConfig, retrieve
from dinov2.curate.runner import Watcher
from dinov2.curate.steps import Counts, Output, Step
from tests.curate.test_runner import contents
from tests.curate.vector_pools import clustered_vectors, unit_vectors, vector_pool


def decisions(pool: Pool, seeds: dict[str, Pool], config: RetrieveConfig, output: Path) -> dict[str, list[object]]:
    after: Pool = run_steps(retrieve(pool, seeds, config, str(output)), Inline())
    tables = [read_table(after.decisions[-1], shard).to_pydict() for shard in pool.shards()]
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


@pytest.fixture
def vectors() -> np.ndarray:
    return clustered_vectors(300, 24, 10, 0.6, seed=0)


def test_the_nearest_of_each_seed(tmp_path: Path, vectors: np.ndarray) -> None:
    vectors[5] = np.nan
    pool = vector_pool(tmp_path / "pool", vectors, [100, 100, 250])
    seeds = {name: clustered_vectors(12, 24, 10, 0.6, seed) for seed, name in ((0, "a"), (1, "b"))}
    pools = {name: vector_pool(tmp_path / name, rows, [7]) for name, rows in seeds.items()}
    config = RetrieveConfig(method="sample", neighbours=3, neighbours_of=("b=5",))
    found = decisions(pool, pools, config, tmp_path / "out")

    times = np.zeros(300, int)
    for name, k in (("a", 3), ("b", 5)):
        cosines = seeds[name].astype(np.float64) @ np.nan_to_num(vectors.astype(np.float64)).T  # [12, 300]
        cosines[:, 5] = -2
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        times += np.bincount(nearest.ravel(), minlength=300)
        if name == "a":
            best = np.where((nearest[:, :, None] == np.arange(300)).any(axis=1), cosines, -2)  # [12, 300]
    assert found["times"] == times.tolist()
    assert found["keep"] == (times > 0).tolist()
    for row in np.flatnonzero(best.max(axis=0) > -2).tolist():
        assert found["seed_set"][row] == "a"
        assert found["seed"][row] == best[:, row].argmax()
        assert found["cosine"][row] == pytest.approx(best[:, row].max(), abs=1e-6)
    assert {found["seed_set"][row] for row in np.flatnonzero(times == 0).tolist()} == {None}
    assert {found["reason"][row] for row in np.flatnonzero(times == 0).tolist()} == {"not retrieved"}


def test_some_of_each_cluster_that_holds_enough_seeds(tmp_path: Path) -> None:
    """Five far heaps; seeds lie in two of them, in a third too few."""
    centres = np.eye(5, 8)
    rng = np.random.default_rng(0)
    heap = np.repeat(np.arange(5), [50, 40, 30, 20, 10])
    pool = vector_pool(tmp_path / "pool", unit_vectors(centres[heap] + 0.01 * rng.standard_normal((150, 8))), [70])
    of_seed = np.repeat([0, 3, 4], [6, 4, 3])
    seeds = {"s": vector_pool(tmp_path / "s", unit_vectors(centres[of_seed] + 0.01 * rng.standard_normal((13, 8))))}
    config = RetrieveConfig(per_cluster=25, clusters=ClusterConfig(clusters=5, sample=30))
    found = decisions(pool, seeds, config, tmp_path / "out")
    kept = np.bincount(heap[np.array(found["keep"])], minlength=5)
    assert kept.tolist() == [25, 0, 0, 20, 0]
    assert len(set(zip(heap.tolist(), found["cluster"], strict=True))) == 5
    assert set(found["seed"]) == {None}
    config = dataclasses.replace(config, cap=11)
    assert sum(decisions(pool, seeds, config, tmp_path / "out")["keep"]) == 11


def test_sets_that_ask_for_one_cluster_draw_each_for_itself(tmp_path: Path) -> None:
    """Two sets of seeds that are alike draw 100 of the same 400 images: 175 in all, give or take 6."""
    x = clustered_vectors(400, 8, 1, 0.6, seed=0)
    pool, seeds = vector_pool(tmp_path / "pool", x, [90]), vector_pool(tmp_path / "s", x[:9])
    config = RetrieveConfig(per_cluster=100, clusters=ClusterConfig(clusters=1))
    found = decisions(pool, {"a": seeds, "b": seeds}, config, tmp_path / "out")
    assert sum(found["times"]) == 200  # type: ignore[arg-type]
    assert 150 < sum(found["keep"]) < 199  # type: ignore[arg-type]


def test_a_balanced_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    heap = np.repeat(np.arange(4), [100, 50, 20, 4])
    x = unit_vectors(np.eye(4, 6)[heap] + 0.01 * rng.standard_normal((174, 6)))
    clusters = ClusterConfig(clusters=4, sample=50)
    config = RetrieveConfig(method="hierarchical", total=64, clusters=clusters)
    found = decisions(vector_pool(tmp_path / "pool", x), {}, config, tmp_path / "out")
    assert np.bincount(heap[np.array(found["keep"])], minlength=4).tolist() == [20, 20, 20, 4]


def test_sets_choose_their_method_by_size(tmp_path: Path, vectors: np.ndarray) -> None:
    pool = vector_pool(tmp_path / "pool", vectors)
    seeds = {
        "large": vector_pool(tmp_path / "large", vectors[:40]),
        "small": vector_pool(tmp_path / "small", vectors[50:60]),
    }
    config = RetrieveConfig(cluster_below=30, neighbours=1, min_seeds=1, clusters=ClusterConfig(clusters=3))
    found = decisions(pool, seeds, config, tmp_path / "out")
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "out").iterdir()}
    assert {"retrieve-large-neighbours", "retrieve-small-drawn"} <= names
    assert not {"retrieve-small-neighbours", "retrieve-large-drawn"} & names
    assert [found["seed_set"][row] for row in range(40)] == ["large"] * 40


class Notes(Watcher):
    """What the terminal and the report say about the choice."""

    def __init__(self) -> None:
        self.of_step: dict[str, str] = {}

    def ended(self, step: Step) -> None:
        self.of_step[step.name.rpartition("-")[2]] = step.note


def kept_and_noted(pool: Pool, seeds: dict[str, Pool], config: RetrieveConfig, output: Path) -> tuple[int, str]:
    notes = Notes()
    after: Pool = run_steps(retrieve(pool, seeds, config, str(output)), Inline(), watcher=notes)
    return sum(int(after.kept(shard).sum()) for shard in pool.shards()), notes.of_step["decisions"]


SCATTERED = ClusterConfig(clusters=40, passes=0)


@pytest.mark.parametrize(
    ("seeds", "config", "kept", "note"),
    [
        (
            28,
            RetrieveConfig(),
            range(30, 100),
            "clusters of 181 images are too coarse (retrieve.small_pool 1,000), so the 4 nearest images of each of 28",
        ),
        (28, RetrieveConfig(method="cluster"), range(15, 120), " of 13 clusters hold at least 4 of its 28 seeds: "),
        (28, RetrieveConfig(small_pool=181), range(15, 120), " of 13 clusters hold at least 4 of its 28 seeds: "),
        (28, RetrieveConfig(method="cluster", cap=7), range(7, 8), "7 of 181 images, as many as retrieve.cap allows"),
        (
            3,
            RetrieveConfig(),
            range(5, 13),
            "no cluster can hold retrieve.min_seeds 4 of its 3 seeds, so the 4 nearest",
        ),
        (1, RetrieveConfig(), range(4, 5), "no cluster can hold retrieve.min_seeds 4 of its 1 seed, so the 4 nearest"),
        (3, RetrieveConfig(method="cluster"), range(1), "none of 13 clusters hold at least 4 of its 3 seeds"),
        (
            9,
            RetrieveConfig(clusters=SCATTERED, min_seeds=9),
            range(9, 37),
            "none of 40 clusters hold at least 9 of its 9 seeds, so the 4 nearest images of each of 9 seeds were taken",
        ),
        (2, RetrieveConfig(neighbours=500), range(181, 182), "the 500 nearest images of each of 2 seeds were taken,"),
    ],
    ids=["small pool", "cluster", "given", "cap", "few seeds", "one seed", "few seeds, cluster", "scattered", "k > N"],
)
def test_small_pools_and_few_seeds_get_what_is_like_them_and_a_line_says_how(
    tmp_path: Path, seeds: int, config: RetrieveConfig, kept: range, note: str
) -> None:
    """28 seeds of one kind in 181 images of ten kinds once kept all 181, and 3 seeds none, without a word."""
    pool = vector_pool(tmp_path / "pool", clustered_vectors(181, 24, 10, 0.8, seed=0), [100])
    own = {"fish": vector_pool(tmp_path / "fish", clustered_vectors(400, 24, 10, 0.8, seed=0)[181 : 181 + seeds])}
    number, said = kept_and_noted(pool, own, config, tmp_path / "out")
    assert number in kept
    assert said.startswith("fish: ")
    assert note in said
    assert f"{number:,} of 181 images" in said or number in (0, 181)


def test_a_set_without_one_readable_image_asks_for_nothing_and_says_so(tmp_path: Path, vectors: np.ndarray) -> None:
    pool = vector_pool(tmp_path / "pool", vectors)
    junk = vector_pool(tmp_path / "junk", np.full((5, 24), np.nan, np.float16))
    gone = Output(str(tmp_path / "gone"), "00000")
    gone.finish(write_decisions(gone, ["unreadable"] * 5, np.ones(5, dtype=bool)))
    Output(gone.folder, "00001").finish(Counts(5, 5))  # of a shard that the set no longer has
    own = {"junk": junk.after(gone.folder), "s": vector_pool(tmp_path / "s", vectors[:2])}
    number, said = kept_and_noted(pool, own, RetrieveConfig(neighbours=3), tmp_path / "out")
    assert 3 <= number <= 6
    assert said.startswith("junk: it has no image with features, so it asks for nothing; s: no cluster")


def test_a_balanced_sample_of_a_small_pool_says_what_it_cannot_do(tmp_path: Path) -> None:
    pool = vector_pool(tmp_path / "pool", clustered_vectors(120, 8, 4, 0.3, seed=0))
    config = RetrieveConfig(method="hierarchical", total=1000, clusters=ClusterConfig(levels=(50, 3), passes=0))
    number, said = kept_and_noted(pool, {}, config, tmp_path / "out")
    assert number == 120
    assert said == (
        "120 of 120 images, shared out over 10 clusters; retrieve.total 1,000 is more than there are; levels of 50"
        " clusters change nothing above so few"
    )


def test_without_seeds_everything_stays(tmp_path: Path, vectors: np.ndarray) -> None:
    pool = vector_pool(tmp_path / "pool", vectors)
    assert run_steps(retrieve(pool, {}, RetrieveConfig(), str(tmp_path / "out")), Inline()) == pool
    with pytest.raises(ValueError, match=r"seeds: expected at least one set for retrieve\.method sample"):
        run_steps(retrieve(pool, {}, RetrieveConfig(method="sample"), str(tmp_path / "out")), Inline())


def test_same_bytes_on_every_engine(tmp_path: Path, vectors: np.ndarray) -> None:
    pool = vector_pool(tmp_path / "pool", vectors, [120])
    seeds = {"a": vector_pool(tmp_path / "a", vectors[:30]), "b": vector_pool(tmp_path / "b", vectors[40:50])}
    config = RetrieveConfig(cluster_below=20, min_seeds=1, clusters=ClusterConfig(clusters=4, passes=1))
    for name, engine in (("one", Inline()), ("two", ProcessPool(2))):
        run_steps(retrieve(pool, seeds, config, str(tmp_path / "out" / name)), engine)
    assert contents(tmp_path / "out" / "one") == contents(tmp_path / "out" / "two")


@pytest.mark.parametrize(
    "settings", [{"neighbours": 0}, {"neighbours_of": ("a",)}, {"neighbours_of": ("a=0",)}, {"total": -1}]
)
def test_settings_are_checked(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"retrieve.{next(iter(settings))}"):
        RetrieveConfig(**settings)  # type: ignore[arg-type]


def test_names_of_sets_are_checked(tmp_path: Path, vectors: np.ndarray) -> None:
    pool = vector_pool(tmp_path / "pool", vectors)
    with pytest.raises(ValueError, match="seeds: expected names of letters"):
        run_steps(retrieve(pool, {"../x": pool}, RetrieveConfig(), str(tmp_path / "out")), Inline())
