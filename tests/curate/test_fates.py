"""One table names every image and link and says what became of it, with the words of whoever refused it."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from dinov2.cli import main
from dinov2.curate import CurateConfig, curate, run_steps
from dinov2.curate.collect import CollectConfig
from dinov2.curate.download import DownloadConfig
from dinov2.curate.engines import Inline
from dinov2.curate.extract import ExtractConfig
from dinov2.curate.materialize import NothingLeftError
from dinov2.curate.pipeline import EmptySetWarning
from dinov2.curate.report import write_report
from dinov2.curate.screen import ScreenConfig
from dinov2.data import BrokenLinkWarning
from dinov2.data.outputs import DROPPED, FATES
from dinov2.recipes import laptop
from tests.curate.misbehaving import serving
from tests.curate.pictures import encoded, picture, write_pool
from tests.data.test_remarks import damaged_lzw, odd_exif


def fates(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(output / FATES).to_pylist()
    return rows


def brief(output: Path) -> dict[tuple[str, str], tuple[str, str | None]]:
    """Fate and reason by set and name; every name is there once."""
    rows = fates(output)
    named = {(row["set"], row["name"]): (row["fate"], row["reason"]) for row in rows}
    assert len(named) == len(rows)
    return named


def of_tests(output: Path, **settings: Any) -> CurateConfig:
    return dataclasses.replace(laptop(), output=str(output), screen=ScreenConfig(faces="none"), **settings)


def test_files_of_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the command, whose last lines name the tables. No library says anything by itself."""
    images, tests, output = tmp_path / "images", tmp_path / "tests", tmp_path / "out"
    contents = {
        "a/twice.png": encoded(picture(0)),
        "bad.tif": damaged_lzw(),
        "cut.png": encoded(picture(1))[:-300],
        "empty.jpg": b"",
        "large.png": encoded(picture(2)) + bytes(200_000),
        "notes.txt": b"none of them is an image",
        "odd.jpg": odd_exif(),
        "tiny.png": encoded(picture(3, 20, 30)),
        "twice.png": encoded(picture(0)),
        "web page, saved.jpg": b"<html>",
    }
    for name, content in contents.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(content)
    (images / "broken link.png").symlink_to("nowhere")
    os.mkfifo(images / "pipe.png")
    tests.mkdir()
    (tests / "cut.png").write_bytes(contents["cut.png"])
    options = ["--screen.faces", "none", "--engine.kind", "inline", "--collect.shard_size", "3"]
    options += ["--collect.max_bytes", "200000", "--images", str(images), "--evaluation_sets", str(tests)]
    unusable = pytest.warns(EmptySetWarning, match=f"evaluation_sets: '{tests}' has no image that can be used")
    with unusable, pytest.warns(BrokenLinkWarning):
        assert main(["curate", "run", "laptop", *options, "--output", str(output)]) == 0
    shown, errors = capfd.readouterr()
    assert f"every image and its fate: {output / FATES}\n" in shown
    assert f"names and reasons of dropped images: {output / DROPPED}\n" in shown
    assert errors == ""

    assert brief(output) == {
        ("pool", "a/twice.png"): ("kept", None),
        ("pool", "bad.tif"): ("screen", "unreadable"),
        ("pool", "broken link.png"): ("collect", "cannot be opened"),
        ("pool", "cut.png"): ("screen", "unreadable"),
        ("pool", "empty.jpg"): ("collect", "no image by its content"),
        ("pool", "large.png"): ("collect", "file too large"),
        ("pool", "notes.txt"): ("collect", "no image: .txt"),
        ("pool", "odd.jpg"): ("kept", None),
        ("pool", "pipe.png"): ("collect", "cannot be opened"),
        ("pool", "tiny.png"): ("screen", "too small"),
        ("pool", "twice.png"): ("screen", "exact duplicate"),
        ("pool", "web page, saved.jpg"): ("collect", "no image by its content"),
        ("evaluation_sets/tests", "cut.png"): ("embed", "unreadable"),
    }
    rows = {row["name"]: row for row in fates(output) if row["set"] == "pool"}
    assert "LZWDecode: Not enough data" in rows["bad.tif"]["remark"]
    assert rows["cut.png"]["remark"] == "image file is truncated"
    assert rows["odd.jpg"]["remark"].startswith("Corrupt EXIF data")
    assert rows["pipe.png"]["remark"] == "it is no regular file"
    assert rows["broken link.png"]["remark"] == "No such file or directory"
    assert (rows["tiny.png"]["width"], rows["tiny.png"]["height"]) == (20, 30)
    assert rows["twice.png"]["instead"] == f"{rows['a/twice.png']['shard']}/{rows['a/twice.png']['row']}"
    with (output / DROPPED).open(newline="", encoding="utf-8") as file:
        dropped = list(csv.DictReader(file))
    assert [(row["set"], row["name"], row["reason"]) for row in dropped] == [
        (row["set"], row["name"], row["reason"]) for row in fates(output) if row["reason"] is not None
    ]

    page = (output / "report.html").read_text()
    assert all(name in page for name in (*rows.keys() - {"a/twice.png"}, FATES, DROPPED, "LZWDecode", "Corrupt EXIF"))
    before = (output / FATES).read_bytes(), (output / DROPPED).read_bytes()
    assert main(["curate", "report", f"{output}/config.json"]) == 0
    assert before == ((output / FATES).read_bytes(), (output / DROPPED).read_bytes())


def test_a_run_that_leaves_nothing_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    (images / "junk.jpg").write_bytes(b"junk")
    (images / "cut.png").write_bytes(encoded(picture(1))[:-300])
    options = ["--images", str(images), "--output", str(output), "--engine.kind", "inline", "--screen.faces", "none"]
    assert main(["curate", "run", "laptop", *options]) == 1
    shown, error = capsys.readouterr()
    assert error.startswith("dinov2 curate: no image is left to write")
    assert f"{output / DROPPED}" in shown
    assert brief(output) == {
        ("pool", "junk.jpg"): ("collect", "no image by its content"),
        ("pool", "cut.png"): ("screen", "unreadable"),
    }
    assert "junk.jpg" in (output / "report.html").read_text()


def test_pages_and_links(tmp_path: Path) -> None:
    """From pages on: archives that cannot be read, links that nobody can fetch, and the images of the others."""
    pages, output = tmp_path / "pages", tmp_path / "out"
    pages.mkdir()
    with socket.socket() as unused, serving() as server:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/x.jpg"
        paths = ("fine?1", "gone", "html", "private/x", "icon")
        links = [*(f"{server.address}/{path}" for path in paths), dead]
        (pages / "a.html").write_text("".join(f'<img src="{link}">' for link in links))
        (pages / "b.html.gz").write_bytes(gzip.compress(b"<p>" * 99)[:-12])
        config = of_tests(
            output,
            pages=str(pages),
            extract=ExtractConfig(),
            download=DownloadConfig(delay=0, tries=1, timeout=5, allow_private_addresses=True),
        )
        run_steps(curate(config), Inline(), tries=1)
    page = Path(write_report(config)).read_text()
    reasons = {
        "b.html.gz": ("extract", "damaged archive"),
        f"{server.address}/fine?1": ("kept", None),
        f"{server.address}/gone": ("download", "HTTP 404"),
        f"{server.address}/html": ("download", "no image"),
        f"{server.address}/private/x": ("download", "robots.txt"),
        f"{server.address}/icon": ("download", "too small"),
        dead: ("download", "no connection"),
    }
    assert brief(output) == {("pool", name): fate for name, fate in reasons.items()}
    remarks = {row["name"]: row["remark"] for row in fates(output)}
    assert remarks[f"{server.address}/icon"] == "16 x 16 pixels"
    assert remarks[f"{server.address}/html"].startswith("its format is unknown")
    assert dead in page
    assert "Connect call failed" in page


def test_images_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were kept by every stage, and are not in the final set. Keys name the images of tars."""

    def unable(content: bytes, faces: object) -> bytes:
        raise ValueError("no disk for faces")

    monkeypatch.setattr("dinov2.curate.materialize.blurred_file", unable)
    pool = write_pool(tmp_path / "pool", [{"wide": encoded(picture(0, 120, 90))}, {"high": encoded(picture(1))}])
    config = dataclasses.replace(
        of_tests(tmp_path / "out", images=pool.images), screen=ScreenConfig(faces="tests.curate.plugged_in:corner")
    )
    run_steps(curate(config), Inline(), tries=1)
    write_report(config)
    assert brief(tmp_path / "out") == {
        ("pool", "00000/wide"): ("materialize", "cannot be read"),
        ("pool", "00001/high"): ("kept", None),
    }
    assert fates(tmp_path / "out")[0]["remark"] == "no disk for faces"

    only = write_pool(tmp_path / "only", [{"wide": encoded(picture(0, 120, 90))}])
    alone = dataclasses.replace(config, output=str(tmp_path / "alone"), images=only.images)
    with pytest.raises(NothingLeftError, match="none of 1 images could be written"):
        run_steps(curate(alone), Inline(), tries=1)


def test_sets_of_tars_with_the_least_index(tmp_path: Path) -> None:
    """Offsets and sizes are all that an index must have; the name is then that of the shard and the row."""
    pool = write_pool(tmp_path / "pool", [{"a": encoded(picture(0))}])
    tests = write_pool(tmp_path / "tests", [{"b": encoded(picture(1))}, {"c": encoded(picture(2))[:-300]}])
    for file in (tmp_path / "tests" / "index").iterdir():
        index = pyarrow.parquet.read_table(file, columns=["offset", "size"])
        pyarrow.parquet.write_table(index, file)
    config = of_tests(tmp_path / "out", images=pool.images, evaluation_sets=(tests.images,))
    run_steps(curate(config), Inline(), tries=1)
    write_report(config)
    assert brief(tmp_path / "out") == {
        ("pool", "00000/a"): ("kept", None),
        ("evaluation_sets/tests", "00000/0"): ("used", None),
        ("evaluation_sets/tests", "00001/0"): ("embed", "unreadable"),
    }


def test_shards_after_one_another(tmp_path: Path) -> None:
    """Rows come in the order of shards, whatever is skipped between them, and a report of a part says what is known."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(6):
        (images / f"{number}.png").write_bytes(encoded(picture(number)) if number % 3 else b"junk")
    config = of_tests(tmp_path / "out", images=str(images), collect=CollectConfig(shard_size=2))
    for step in curate(config):
        run_steps(iter_of(step), Inline())
        if step.name == "collect-images":
            break
    write_report(config)
    rows = [(row["shard"], row["row"], row["name"], row["fate"]) for row in fates(tmp_path / "out")]
    assert rows == [
        ("00000", 0, "1.png", "kept"),
        (None, None, "0.png", "collect"),
        ("00001", 0, "2.png", "kept"),
        (None, None, "3.png", "collect"),
        ("00002", 0, "4.png", "kept"),
        ("00002", 1, "5.png", "kept"),
    ]


def iter_of(step: Any) -> Any:
    """A stage of one step."""
    yield step
