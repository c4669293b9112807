"""The final set: the images that are in, byte for byte but for faces, in an order of its own, ready to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinov2.curate import Pool, run_steps
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.materialize import COLUMNS_OF_STAGES, MaterializeConfig, materialize
from dinov2.curate.pool import write_decisions
from dinov2.curate.retrieve import RetrieveConfig, retrieve
from dinov2.curate.screen import ScreenConfig, screen
from dinov2.curate.steps import Output
from dinov2.data import TarShards
from dinov2.data.shards import storage
from dinov2.data.shards.writing import COLUMNS
from tests.curate.pictures import encoded, picture, write_pool
from tests.curate.test_runner import contents
from tests.curate.vector_pools import unit_vectors


def a_pool(tmp_path: Path) -> tuple[Pool, dict[str, bytes]]:
    """Three shards of four images, of which the first of each is out."""
    files = [{f"k{n}{i}": encoded(picture(10 * n + i)) for i in range(4)} for n in range(3)]
    pool = write_pool(tmp_path / "pool", list(files))
    for shard in pool.shards():
        reasons = ["out", None, None, None]
        write_decisions(Output(str(tmp_path / "d"), shard), reasons, np.ones(4, dtype=bool), {"times": [1, 2, 3, 4]})
    kept = {key: content for part in files for key, content in list(part.items())[1:]}
    return pool.after(str(tmp_path / "d")), kept


def test_what_is_in_is_written(tmp_path: Path) -> None:
    pool, kept = a_pool(tmp_path)
    root: str = run_steps(materialize(pool, {}, MaterializeConfig(shard_size=4), str(tmp_path / "out")), Inline())
    shards = TarShards(root)
    written = [shards.read_bytes(number) for number in range(len(shards))]
    assert sorted(written) == sorted(kept.values())
    assert written != list(kept.values())  # shuffled
    assert len(set(shards.names())) == 9
    final = Pool(root)
    assert final.shards() == ["00000", "00001", "00002"]
    times = [n for shard in final.shards() for n in final.index(shard, ["times"])["times"].to_pylist()]
    assert sorted(times) == sorted([2, 3, 4] * 3)
    sources = {s for shard in final.shards() for s in final.index(shard, ["source"])["source"].to_pylist()}
    assert sources == {"00000", "00001", "00002"}
    again: str = run_steps(
        materialize(pool, {}, MaterializeConfig(shard_size=4), str(tmp_path / "two")), ProcessPool(2)
    )
    assert contents(Path(again)) == contents(Path(root))
    other = MaterializeConfig(shard_size=4, seed=1)
    third = TarShards(run_steps(materialize(pool, {}, other, str(tmp_path / "out")), Inline()))
    assert [third.read_bytes(number) for number in range(9)] != written


def test_what_was_drawn_is_mixed(tmp_path: Path) -> None:
    """A draw takes 40 of the 200 images of one kind and all 40 of another, and mixes both kinds."""
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat([0, 1], [200, 40]))
    files = {f"k{i:03d}": encoded(np.full((8, 8, 3), i, np.uint8)) for i in range(240)}
    pool = write_pool(tmp_path / "pool", [files])
    vectors = unit_vectors(np.eye(2, 8)[kind] + 0.01 * rng.standard_normal((240, 8)))
    Output(str(tmp_path / "features"), "00000").write_array(vectors)
    pool = Pool(pool.images, features=str(tmp_path / "features"))
    config = RetrieveConfig(method="hierarchical", total=80, clusters=ClusterConfig(clusters=2))
    pool = run_steps(retrieve(pool, {}, config, str(tmp_path / "out")), Inline())
    root: str = run_steps(materialize(pool, {}, MaterializeConfig(), str(tmp_path / "out")), Inline())
    cluster = Pool(root).index("00000", ["cluster"])["cluster"].to_numpy()
    assert np.bincount(cluster).tolist() == [40, 40]
    assert 10 < cluster[:40].sum() < 30  # 20 and 3.2


def test_files_of_many_shards_do_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 3)
    opened, closed = [], []

    class Watched(storage._OpenFile):
        def __init__(self, path: str) -> None:
            super().__init__(path)
            opened.append(path)
            assert len(opened) - len(closed) <= 4  # one is opened before another goes

        def __del__(self) -> None:
            super().__del__()
            closed.append(self.descriptor)

    monkeypatch.setattr(storage, "_OpenFile", Watched)
    pool = write_pool(tmp_path / "pool", [{"k": encoded(picture(n, 8, 8))} for n in range(12)])
    root: str = run_steps(materialize(pool, {}, MaterializeConfig(), str(tmp_path / "out")), Inline())
    assert len(opened) == len(TarShards(root)) == 12


def test_sets_of_seeds_as_they_are(tmp_path: Path) -> None:
    pool, kept = a_pool(tmp_path)
    seeds = {name: write_pool(tmp_path / name, [{"s": encoded(picture(90 + n))}]) for n, name in enumerate("ab")}
    for names, count in ((("a",), 1), (("*",), 2)):
        config = MaterializeConfig(as_is=names)
        root: str = run_steps(materialize(pool, seeds, config, str(tmp_path / "out")), Inline())
        assert len(TarShards(root)) == len(kept) + count
    renamed = {"z": seeds["a"]}
    root = run_steps(materialize(pool, renamed, MaterializeConfig(as_is=("z",)), str(tmp_path / "out")), Inline())
    sources = Pool(root).index("00000", ["source"])["source"].to_pylist()
    assert [source for source in sources if "/" in source] == ["z/00000"]
    with pytest.raises(ValueError, match=r"as_is: expected names of sets of seeds, \['a', 'b'\], got \['c'\]"):
        run_steps(materialize(pool, seeds, MaterializeConfig(as_is=("c",)), str(tmp_path / "out")), Inline())


def test_faces_are_blurred_and_other_bytes_stay(tmp_path: Path) -> None:
    files = {"wide": encoded(picture(0, 120, 80)), "tall": encoded(picture(1, 80, 120))}
    pool = write_pool(tmp_path / "pool", [files])
    settings = ScreenConfig(faces="tests.curate.plugged_in:corner")
    pool = run_steps(screen(pool, settings, str(tmp_path / "out")), Inline())
    for blur in (True, False):
        config = MaterializeConfig(blur_faces=blur)
        shards = TarShards(run_steps(materialize(pool, {}, config, str(tmp_path / "out")), Inline()))
        written = {shards[number].shape[0]: shards.read_bytes(number) for number in range(2)}
        assert written[120] == files["tall"]
        assert (written[80] == files["wide"]) != blur


def test_columns_have_one_order(tmp_path: Path) -> None:
    """It does not depend on Python's hash seed, or the same curation would not write the same bytes twice."""
    pool = write_pool(tmp_path / "pool", [{"a": encoded(picture(0)), "b": encoded(picture(1))}])
    for folder, names in (("late", ("times", "seed_set")), ("all", ("seed_set", "times", "component", "cluster"))):
        columns = {name: [0, 1] for name in names}
        write_decisions(Output(str(tmp_path / folder), "00000"), [None] * 2, np.ones(2, dtype=bool), columns)
        after = pool.after(str(tmp_path / folder))
        root: str = run_steps(materialize(after, {}, MaterializeConfig(), str(tmp_path / "out")), Inline())
        own = [name for name in COLUMNS_OF_STAGES if name in names]
        assert Pool(root).index("00000").column_names == [*COLUMNS, *own, "source"]


def test_nothing_left(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", [{"a": encoded(picture(0))}])
    write_decisions(Output(str(tmp_path / "d"), "00000"), ["out"], np.ones(1, dtype=bool))
    with pytest.raises(ValueError, match="no image is left"):
        run_steps(
            materialize(pool.after(str(tmp_path / "d")), {}, MaterializeConfig(), str(tmp_path / "out")), Inline()
        )
