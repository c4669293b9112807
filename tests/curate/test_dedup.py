"""Deduplication of planted copies, chains and evaluation images; the same decisions on any engine, from any shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pytest

from dinov2.curate.dedup import DedupConfig, dedup
from dinov2.curate.dedup.grouping import PART
from dinov2.curate.engines import Engine, Inline, ProcessPool
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.runner import run_steps
from dinov2.curate.search import SearchConfig
from tests.curate.vector_pools import unit_vectors, vector_pool

Vectors = npt.NDArray[np.float16]
DIMENSIONS = 64


def run(
    root: Path, pool: Pool, references: dict[str, Pool], config: DedupConfig | None = None, engine: Engine | None = None
) -> Pool:
    return run_steps(dedup(pool, references, config or DedupConfig(), str(root / "out")), engine or Inline())


def decisions(pool: Pool) -> dict[str, list[Any]]:
    """Columns over all shards."""
    tables = [read_table(pool.decisions[-1], shard) for shard in pool.shards()]
    columns: dict[str, list[Any]] = pyarrow.concat_tables(tables).to_pydict()
    return columns


def near(vectors: Vectors, cosine: float, seed: int) -> Vectors:
    """Vectors [N, D] with about this cosine to others [N, D]."""
    noise = np.random.default_rng(seed).standard_normal(vectors.shape)
    noise -= (noise * vectors).sum(1, keepdims=True) * vectors
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    return unit_vectors(cosine * vectors.astype(np.float64) + np.sqrt(1 - cosine**2) * noise)


def chain(angles: list[float]) -> Vectors:
    """Vectors in a plane, at angles in degrees."""
    radians = np.deg2rad(angles)
    vectors = np.zeros((len(angles), DIMENSIONS))
    vectors[:, 0], vectors[:, 1] = np.cos(radians), np.sin(radians)
    return unit_vectors(vectors)


@pytest.fixture(scope="module")
def originals() -> Vectors:
    """Unlike each other: no two have a cosine above 0.4."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((DIMENSIONS, DIMENSIONS)))
    return unit_vectors(basis)


@pytest.mark.parametrize("part", [PART, 7], ids=["one part", "components cut in parts"])
def test_one_of_each_group_is_kept_the_largest(
    tmp_path: Path, originals: Vectors, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2.curate.dedup.grouping.PART", part)
    copies = np.concatenate([near(originals[:20], 0.9, seed) for seed in range(3)])
    vectors = np.concatenate([originals, copies])  # row 64 + 20 c + i is copy c of row i
    sizes = np.full(len(vectors), 100)
    sizes[64 + 20 + 5] = 200  # the second copy of row 5 is the largest
    table = decisions(run(tmp_path, vector_pool(tmp_path / "pool", vectors, (50,), sizes), {}))
    expected = np.arange(len(vectors)) < 64
    expected[[5, 64 + 20 + 5]] = False, True
    assert table["keep"] == expected.tolist()
    assert table["reason"] == [None if keep else "duplicate" for keep in expected]
    assert table["component"] == [*range(64), *range(20), *range(20), *range(20)]
    best = [64 + 25 if i == 5 else i for i in range(20)]
    places = [("00000", row) if row < 50 else ("00001", row - 50) for row in best]
    assert list(zip(table["representative_shard"], table["representative_row"], strict=True)) == (
        places + [(None, None)] * 44 + places * 3
    )
    cosines = np.array(table["representative_cosine"][64:])
    assert ((cosines > 0.75) & (cosines < 1.01)).all()
    assert table["reference"] == [None] * len(vectors)


def test_the_guard_breaks_chains(tmp_path: Path) -> None:
    pool = vector_pool(tmp_path / "pool", chain([0, 40, 80, 85, 125, 130]))  # cosines above 0.6: less than 53 degrees
    result = run(tmp_path, pool, {})
    table = decisions(result)
    assert table["component"] == [0] * 6
    assert table["keep"] == [True, False, True, False, False, False]
    assert table["representative_row"] == [0, 0, 2, 2, 2, 2]
    assert table["guard_rejected"] == [False, False, True, True, True, True]
    (counts,) = Path(result.decisions[-1]).glob("*.json")
    assert '"rejected by the guard": 4' in counts.read_text()

    table = decisions(run(tmp_path, pool, {}, DedupConfig(guard_threshold=-1)))
    assert table["keep"] == [True] + [False] * 5
    table = decisions(run(tmp_path, pool, {}, DedupConfig(guard_threshold=0.9, guard_rounds=2)))
    assert table["keep"] == [True, True, True, True, True, True]  # after two rounds all others are kept
    table = decisions(run(tmp_path, pool, {}, DedupConfig(guard_threshold=0.9, guard_rounds=3)))
    assert table["keep"] == [True, True, True, False, True, True]


def test_a_component_near_a_reference_image_goes_as_a_whole(tmp_path: Path, originals: Vectors) -> None:
    # 0 and 1 chained to 2, which is near an evaluation image; 3 alone near another; the rest are unlike.
    arm = chain([0, 50, 100])
    clear = originals - originals[:, :1] * arm[0] - originals[:, 1:2] * chain([90])[0]
    clear = unit_vectors(clear[20:])
    vectors = np.concatenate([arm, near(clear[:1], 0.5, 1), clear[1:], near(clear[1:4], 0.9, 2)])
    tests = vector_pool(tmp_path / "tests", np.concatenate([clear[:1], chain([110])]), (1,))
    trains = vector_pool(tmp_path / "trains", chain([100, 160]))
    pool = vector_pool(tmp_path / "pool", vectors, (2, 30))
    table = decisions(run(tmp_path, pool, {"tests": tests, "trains": trains}))
    assert table["reason"] == ["near an evaluation image"] * 4 + [None] * 43 + ["duplicate"] * 3
    assert table["reference"][:5] == ["trains", "trains", "trains", "tests", None]
    assert table["reference_shard"][:4] == ["00000", "00000", "00000", "00000"]
    assert table["reference_row"][:4] == [0, 0, 0, 0]
    expected = np.cos(np.deg2rad([100, 50, 0]))
    assert np.allclose(table["reference_cosine"][:3], expected, atol=2e-3)
    assert 0.45 < table["reference_cosine"][3] < 0.55
    assert table["representative_row"][:4] == [None] * 4


def test_how_far_a_reference_reaches(tmp_path: Path) -> None:
    pool = vector_pool(tmp_path / "pool", chain([0, 57, 114]))  # cosine of 57 degrees: 0.545, of 60: 0.5
    references = {"tests": vector_pool(tmp_path / "tests", chain([174]))}
    table = decisions(run(tmp_path, pool, references))
    assert table["keep"] == [True, True, False]
    table = decisions(run(tmp_path, pool, references, DedupConfig(reference_reach=0.45)))
    assert table["keep"] == [False, False, False]
    table = decisions(run(tmp_path, pool, {}, DedupConfig(reference_reach=0.45)))
    assert table["keep"] == [True, True, True]


def test_no_evaluation_image_survives(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    tests = unit_vectors(random.standard_normal((80, DIMENSIONS)))
    others = unit_vectors(random.standard_normal((600, DIMENSIONS)))
    planted = np.concatenate([tests, near(tests, 0.9, 6), near(tests, 0.5, 7)])
    order = random.permutation(len(planted) + len(others))
    vectors = np.concatenate([planted, others])[order]
    pool = vector_pool(tmp_path / "pool", vectors, (100, 333))
    result = run(tmp_path, pool, {"tests": vector_pool(tmp_path / "tests", tests)})
    kept = np.concatenate([result.kept(shard) for shard in result.shards()])
    cosines = vectors.astype(np.float64) @ tests.astype(np.float64).T
    assert kept.any()
    assert not (kept & (cosines.max(1) > 0.45)).any()
    assert not kept[order < len(planted)].any()


def test_rows_without_features_and_rows_that_were_out(tmp_path: Path, originals: Vectors) -> None:
    vectors = np.concatenate([originals[:10], originals[:10]])
    vectors[3] = np.nan
    pool = vector_pool(tmp_path / "pool", vectors)
    out = tmp_path / "before"
    out.mkdir()
    before = np.ones(20, bool)
    before[[0, 1, 11]] = False
    pyarrow.parquet.write_table(pyarrow.table({"keep": before}), out / "00000.parquet")
    table = decisions(run(tmp_path, pool.after(str(out)), {}))
    assert table["keep"] == [False, False, True, False, *[True] * 6, True, False, False, True, *[False] * 6]
    assert [table["reason"][row] for row in (0, 1, 3, 11, 12)] == [
        None,
        None,
        "no features to compare",
        None,
        "duplicate",
    ]
    assert table["component"][:4] == [None, None, 2, None]


def test_reference_images_without_features_are_counted(tmp_path: Path, originals: Vectors) -> None:
    tests = originals[:6].copy()
    tests[2:5] = np.nan
    pool = vector_pool(tmp_path / "pool", originals)
    table = decisions(run(tmp_path, pool, {"tests": vector_pool(tmp_path / "tests", tests, (4,))}))
    assert [row for row, keep in enumerate(table["keep"]) if not keep] == [0, 1, 5]
    (counts,) = (tmp_path / "out").glob("dedup-components-*/all.json")
    assert '"reference images without features, not looked for": 3' in counts.read_text()


@pytest.mark.parametrize("index", ["flat", "ivf_sq8"])
def test_engines_and_shards_change_nothing(tmp_path: Path, index: str) -> None:
    random = np.random.default_rng(8)
    originals = unit_vectors(random.standard_normal((700, DIMENSIONS)))
    copies = near(originals[random.integers(700, size=500)], 0.75, 9)  # chains among them, with a threshold of 0.5
    vectors = np.concatenate([originals, copies])[random.permutation(1200)]
    sizes = random.integers(1, 4, size=1200)
    references = {"tests": vector_pool(tmp_path / "tests", near(vectors[::40], 0.7, 10))}
    search = SearchConfig(index=index, index_rows=700, query_rows=400, lists=8, probes=3)
    config = DedupConfig(threshold=0.5, search=search)
    pool = vector_pool(tmp_path / "pool", vectors, (100, 250, 400, 401, 800, 1000), sizes)
    whole = vector_pool(tmp_path / "whole", vectors, (), sizes)
    first = run(tmp_path / "first", pool, references, config)
    in_one = decisions(run(tmp_path / "one", whole, references, config))
    table = decisions(first)
    places = np.array([0, 100, 250, 400, 401, 800, 1000])
    for row, (shard, place) in enumerate(zip(table["representative_shard"], table["representative_row"], strict=True)):
        expected = None if shard is None else place + int(places[int(shard)])
        assert in_one["representative_row"][row] == expected
    for name in table.keys() - {"representative_shard", "representative_row"}:
        assert table[name] == in_one[name]
    assert {"duplicate", "near an evaluation image", None} == set(table["reason"])
    assert any(table["guard_rejected"])
    if index == "flat":
        run(tmp_path / "processes", pool, references, config, ProcessPool(2))
        files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").glob("out/*/*.*")]
        assert len(files) > 50
        for path in files:
            assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "processes" / path).read_bytes(), path


def test_an_empty_pool(tmp_path: Path, originals: Vectors) -> None:
    nothing = vector_pool(tmp_path / "pool", originals[:0])
    assert decisions(run(tmp_path, nothing, {}))["keep"] == []
    unlike = vector_pool(tmp_path / "unlike", originals)
    assert decisions(run(tmp_path, unlike, {"none": nothing}))["keep"] == [True] * len(originals)


def test_arguments_are_checked(tmp_path: Path, originals: Vectors) -> None:
    pool = vector_pool(tmp_path / "pool", originals)
    with pytest.raises(ValueError, match=r"dedup\.threshold: expected a cosine, from -1 to 1, got 60"):
        DedupConfig(threshold=60)
    with pytest.raises(ValueError, match=r"dedup\.neighbours: expected at least 1, got 0"):
        DedupConfig(neighbours=0)
    with pytest.raises(ValueError, match="references: expected names of letters"):
        run(tmp_path, pool, {"../tests": pool})
    with pytest.raises(ValueError, match=": expected features"):
        run(tmp_path, pool, {"tests": dataclasses.replace(pool, features=None)})
