"""Files become a pool; tars with an index are one already."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from dinov2.curate import Counts, Pool, run_steps
from dinov2.curate.collect import CollectConfig, collect
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.runner import Watcher
from dinov2.curate.steps import Step
from dinov2.data import BrokenLinkWarning, TarShards, unescaped
from tests.curate.pictures import encoded, picture, write_pool
from tests.curate.test_runner import contents


class Seen(Watcher):
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def ended(self, step: Step) -> None:
        self.steps.append(step)


def test_files_of_any_nesting(tmp_path: Path) -> None:
    images, seen = tmp_path / "images", Seen()
    for name in ("a.png", "b/a.png", "b/c/ümlaut @ home.JPG", ".hidden/x.png", "b/.x.png", "notes.txt"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(encoded(picture(len(name)), "JPEG" if name.endswith("JPG") else "PNG"))
    (images / "empty.jpg").touch()
    (images / "cut.jpg").write_bytes(encoded(picture(3), "JPEG")[:10])
    (images / "huge.png").write_bytes(encoded(picture(1)) + b"\0" * 100_000)
    config = CollectConfig(shard_size=4, max_bytes=100_000)
    pool: Pool = run_steps(collect(str(images), config, str(tmp_path / "out")), Inline(), watcher=seen)
    assert seen.steps[0].counts() == Counts(6, 3, {"file too large": 1, "no image by its content": 2})
    assert pool.shards() == ["00000", "00001"]
    paths = [path for shard in pool.shards() for path in pool.index(shard, ["path"])["path"].to_pylist()]
    assert paths == ["a.png", "b/a.png", "b/c/ümlaut @ home.JPG"]
    assert np.array_equal(TarShards(pool.images)[1], picture(len("b/a.png")))

    again: Pool = run_steps(collect(str(images), config, str(tmp_path / "again")), ProcessPool(2))
    assert contents(Path(again.images)) == contents(Path(pool.images))

    (images / "new.png").write_bytes(encoded(picture(9)))  # other images, another pool
    assert run_steps(collect(str(images), config, str(tmp_path / "out")), Inline()) != pool


def test_what_only_looks_like_a_file(tmp_path: Path) -> None:
    """It is counted; nothing is waited for, and nothing ends the run."""
    images, seen = tmp_path / "images", Seen()
    images.mkdir()
    (images / "whole.png").write_bytes(encoded(picture(0)))
    (images / "broken link.png").symlink_to("nowhere")
    (images / "round link.png").symlink_to("round link.png")
    (images / "link.png").symlink_to("whole.png")
    (images / "folder.png").mkdir()
    os.mkfifo(images / "pipe.png")
    pool: Pool = run_steps(collect(str(images), CollectConfig(), str(tmp_path / "out")), Inline(), watcher=seen)
    assert seen.steps[0].counts() == Counts(5, 2, {"cannot be opened": 3})
    assert pool.index("00000", ["path"])["path"].to_pylist() == ["link.png", "whole.png"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    images, outside = tmp_path / "images", tmp_path / "outside"
    for name in ("a/1.png", "b/2.png"):
        (images / name).parent.mkdir(parents=True)
        (images / name).write_bytes(encoded(picture(int(name[2]))))
    outside.mkdir()
    (outside / "3.png").write_bytes(encoded(picture(3)))
    for name, target in {"a/up": "..", "b/up": "../a", "again": "a", "out": outside, "part": "gone"}.items():
        (images / name).symlink_to(target)
    with pytest.warns(BrokenLinkWarning, match="1 links under .* lead nowhere, .*: 'part'"):
        pool: Pool = run_steps(collect(str(images), CollectConfig(), str(tmp_path / "out")), Inline())
    assert pool.index("00000", ["path"])["path"].to_pylist() == ["a/1.png", "b/2.png", "out/3.png"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    try:
        for name in (b"caf\xe8.png", b"caf\xe9.png", rb"caf\xe9.png"):
            (images / os.fsdecode(name)).write_bytes(encoded(picture(name[-5])))
    except OSError:
        pytest.skip("this filesystem refuses such names")
    pool: Pool = run_steps(collect(str(images), CollectConfig(), str(tmp_path / "out")), Inline())
    index = pool.index("00000", ["key", "path"]).to_pydict()
    assert index["path"] == [r"caf\x5cxe9.png", r"caf\xe8.png", r"caf\xe9.png"]
    assert len(set(index["key"])) == 3
    assert {os.fsencode(unescaped(path)) for path in index["path"]} == set(os.listdir(os.fsencode(images)))


def test_shards_are_taken_as_they_are(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", [{"a": encoded(picture(0))}])
    taken = run_steps(collect(pool.images, CollectConfig(), str(tmp_path / "out")), Inline())
    assert dataclasses.replace(taken, version="") == pool
    assert not (tmp_path / "out").exists()
    next((tmp_path / "pool" / "index").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"got 1 tars without one under .*: write them with dinov2 index"):
        run_steps(collect(pool.images, CollectConfig(), str(tmp_path / "out")), Inline())


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: expected a folder of images or of tar shards"):
        run_steps(collect(str(tmp_path), CollectConfig(), str(tmp_path / "out")), Inline())
