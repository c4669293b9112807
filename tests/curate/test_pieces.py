"""Shards in pieces, bounded views of images, and progress by images."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from dinov2.curate import Pool, Step, Watcher, embed, pieces, run_steps, views
from dinov2.curate.embed import EmbedConfig, open_model
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.faces import Box
from dinov2.curate.pieces import cut
from dinov2.curate.pipeline import CurateConfig, curate
from dinov2.curate.pool import read_table
from dinov2.curate.retrieve import RetrieveConfig, needs_features
from dinov2.curate.screen import ScreenConfig, screen
from dinov2.curate.steps import Counts, Output, Steps, Task
from dinov2.curate.views import SMALL_SIDE, VIEW_SIDE, in_full, in_reduced, small_columns, small_from, small_of
from dinov2.data import decode_image
from dinov2.data.decoding_reduced import Reduced, decode_reduced
from tests.curate import plugged_in
from tests.curate.pictures import encoded, picture, write_pool
from tests.curate.test_runner import contents

CORNER = ScreenConfig(faces=f"{plugged_in.__name__}:corner", min_entropy=0.0)
WIDE = encoded(picture(0, 1600, 800), "JPEG")


class Seen(Watcher):
    """Notes progress, and the steps."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.steps: list[str] = []

    def started(self, step: Step, done: int) -> None:
        self.steps.append(step.name)

    def progressed(self, step: Step, rows: int) -> None:
        self.rows.append(rows)


def run(pool: Pool, out: Path) -> Pool:
    def both() -> Steps[Pool]:
        screened = yield from screen(pool, CORNER, str(out))
        return (yield from embed.embed(screened, EmbedConfig(), str(out)))

    done: Pool = run_steps(both(), Inline())
    return done


def test_pieces_and_whole_shards_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"i{seed}": encoded(picture(seed)) for seed in range(5)}
    broken = {"cut": encoded(picture(9), "JPEG")[:900], "wide": WIDE}
    pool = write_pool(tmp_path / "pool", [files | broken, {}, {"copy": files["i3"], "other": encoded(picture(8))}])
    results, features = {}, {}
    for name, rows, many in (("whole", 64, 1), ("one", 64, 99), ("pieces", 2, 99)):
        monkeypatch.setattr(pieces, "ROWS", rows)
        monkeypatch.setattr(pieces, "MANY", many)
        after = run(pool, tmp_path / name)
        assert after.features is not None
        tables = [read_table(folder, shard) for folder in after.decisions for shard in pool.shards()]
        results[name] = tables
        features[name] = np.concatenate([after.read_features(shard) for shard in pool.shards()])
    assert results["whole"] == results["one"] == results["pieces"]
    assert [len(table) for table in results["whole"]] == [7, 0, 2, 7, 0, 2]
    for name in ("one", "pieces"):  # other images in a batch change the last bit
        np.testing.assert_allclose(features[name], features["whole"], atol=1e-3)
    assert not list((tmp_path / "whole").glob("*-pieces-*"))
    assert len(list((tmp_path / "pieces").glob("screen-pieces-*/00000.*.parquet"))) == 4


def test_processes_make_the_same_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "ROWS", 2)
    pool = write_pool(tmp_path / "pool", [{f"i{seed}": encoded(picture(seed)) for seed in range(3)}])
    for name, engine in (("inline", Inline()), ("processes", ProcessPool(2))):
        with engine:
            run_steps(embed.embed(pool, EmbedConfig(), str(tmp_path / name)), engine)
    assert contents(tmp_path / "inline") == contents(tmp_path / "processes")


def test_files_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counted(content: bytes, name: str, side: int, least: int = 0) -> Reduced:
        decoded.append(name.split(" ")[0])
        return decode_reduced(content, name, side, least)

    for module in (sys.modules[screen.__module__], views):
        monkeypatch.setattr(module, "decode_reduced", counted)
    monkeypatch.setattr(pieces, "ROWS", 2)
    small, cut = encoded(picture(1)), WIDE[:5000]
    files = {"wide": WIDE, "small": small, "again": WIDE, "cut": cut}
    pool = write_pool(tmp_path / "pool", [files, {"wide": WIDE, "cut": cut}])
    after = run(pool, tmp_path / "out")
    # The copies of rows 0 and 3, in other pieces and another shard, are not decoded. The small file of row 1 is decoded
    # again for its sketch and for its features. The small image of row 0 is taken from screening.
    assert decoded == ["0", "1", "3", "1", "1"]
    assert read_table(after.decisions[0], "00000")["reason"].to_pylist() == [
        None,
        None,
        "exact duplicate",
        "unreadable",
    ]
    assert read_table(after.decisions[0], "00001")["reason"].to_pylist() == ["exact duplicate", "unreadable"]
    expected = open_model(EmbedConfig())([small_of(decode_reduced(WIDE, "", VIEW_SIDE).pixels)])[0]
    np.testing.assert_allclose(after.read_features("00000")[0], expected, atol=1e-3)


def test_copies_have_the_features_of_their_original(tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", [{"a": WIDE[:5000], "b": WIDE[:5000], "c": WIDE, "d": WIDE}])
    after: Pool = run_steps(embed.embed(pool, EmbedConfig(), str(tmp_path / "out")), Inline())
    features = after.read_features("00000")
    assert np.isnan(features[:2]).all()
    assert np.array_equal(features[2], features[3])
    assert read_table(after.decisions[0], "00000")["reason"].to_pylist() == ["unreadable", "unreadable", None, None]


@pytest.mark.parametrize("orientation", [1, 6])
def test_boxes_are_in_pixels_of_the_upright_image_in_full(tmp_path: Path, orientation: int) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    size = (1600, 800) if orientation == 1 else (800, 1600)
    Image.fromarray(picture(0, *size)).save(file, "JPEG", exif=exif)
    assert decode_image(file.getvalue(), "").shape == (800, 1600, 3)
    after = run(write_pool(tmp_path / "pool", [{"wide": file.getvalue()}]), tmp_path / "out")
    # The detector sees 768 x 384 pixels and finds 20 x 30 of them.
    box = {"x": 0, "y": 0, "width": round(20 * 1600 / 768), "height": round(30 * 800 / 384)}
    assert read_table(after.decisions[0], "00000")["faces"].to_pylist() == [[box]]


def test_boxes_are_scaled_by_their_edges() -> None:
    image = Reduced(np.zeros((10, 30, 3), np.uint8), 300, 150)
    assert in_full(Box(3, 2, 5, 4), image) == Box(30, 30, 50, 60)
    assert in_reduced(Box(30, 30, 50, 60), image) == Box(3, 2, 5, 4)


def test_what_is_seen_is_bounded(tmp_path: Path) -> None:
    content = encoded(picture(0, 3000, 1500), "JPEG")
    pool, (piece,) = write_pool(tmp_path / "pool", [{"a": content}]), cut("00000", 1)
    assert small_of(decode_reduced(content, "", VIEW_SIDE).pixels).shape == (128, 256, 3)
    assert open_model(EmbedConfig(model="colour-texture")).reader(pool, piece)(0).shape == (128, 256, 3)
    plugged_in = open_model(EmbedConfig(model="tests.curate.plugged_in:redness"))
    assert plugged_in.reader(pool, piece)(0).shape == (512, 1024, 3)
    wide, other = (decode_reduced(content, "", SMALL_SIDE) for content in (WIDE, encoded(picture(0))))
    kept = small_from(small_columns(wide, wide.pixels))
    assert kept is not None
    np.testing.assert_array_equal(kept, wide.pixels)
    assert small_columns(other, other.pixels) == {}


def slow(output: Output, images: int) -> Counts:
    """Task: advances now and then."""
    for _ in range(images):
        output.advance()
        time.sleep(0.3)
    return Counts(images, images)


def a_step(out: Path) -> Steps[None]:
    yield Step(
        str(out), "test-slow", None, (), [Task("a", slow, (3,), 3), Task("b", slow, (1,), 1), Task("c", slow, (0,))]
    )


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_progress_counts_images_within_a_task(tmp_path: Path, kind: str) -> None:
    seen = Seen()
    with Inline() if kind == "inline" else ProcessPool(1) as engine:
        run_steps(a_step(tmp_path), engine, watcher=seen)
    assert seen.rows == sorted(seen.rows)
    assert {0, 1, 2, 3, 4, 5} == set(seen.rows)
    again = Seen()
    run_steps(a_step(tmp_path), Inline(), watcher=again)
    assert again.rows == [5]


def test_features_that_nobody_reads_are_not_computed(tmp_path: Path) -> None:
    assert not needs_features(RetrieveConfig(), ())
    assert needs_features(RetrieveConfig(), ("seeds",))
    assert needs_features(RetrieveConfig(method="hierarchical"), ())
    (tmp_path / "images").mkdir()
    for seed in range(3):
        (tmp_path / "images" / f"{seed}.png").write_bytes(encoded(picture(seed)))
    config = CurateConfig(
        images=str(tmp_path / "images"), output=str(tmp_path / "out"), screen=ScreenConfig(faces="none")
    )
    seen = Seen()
    run_steps(curate(config), Inline(), watcher=seen)
    assert seen.steps.count("embed-features") == 1
