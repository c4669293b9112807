"""A small curation of every stage from images on: its report says what its tables say, and nothing gets out of it."""

from __future__ import annotations

import dataclasses
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dinov2.cli import main
from dinov2.curate import CurateConfig, curate, run_steps
from dinov2.curate.collect import CollectConfig
from dinov2.curate.engines import EngineConfig, Inline
from dinov2.curate.report import page, sections, write_report
from dinov2.curate.report.fates import Fates
from dinov2.curate.report.finished import finished_steps
from dinov2.curate.report.page import histogram
from dinov2.curate.screen import ScreenConfig
from dinov2.data import TarShards
from dinov2.demo.planted import planted_images
from dinov2.recipes import laptop


class Page(HTMLParser):
    """Every address and every text of a page; fails where tags do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def curation(tmp_path_factory: pytest.TempPathFactory) -> CurateConfig:
    """Images in folders with names that a page must escape, and all that stages have made of them."""
    root = tmp_path_factory.mktemp("curation")
    for image in planted_images(0, per_photograph=5, distractors=6):
        folder = root / {"pool": "pool <b>&amp;", "evaluation": "evaluation", "seed": "seeds"}[image.role]
        folder.mkdir(exist_ok=True)
        (folder / f"{image.name}.jpg").write_bytes(image.content)
    (root / "seeds").mkdir(exist_ok=True)
    for image in planted_images(1, per_photograph=1, distractors=0)[:6]:
        (root / "seeds" / f"{image.name}.jpg").write_bytes(image.content)
    recipe = laptop()
    config = dataclasses.replace(
        recipe,
        output=str(root / "out <i>"),
        images=str(root / "pool <b>&amp;"),
        evaluation_sets=(str(root / "evaluation"),),
        seeds=(str(root / "seeds"),),
        collect=CollectConfig(shard_size=40),
        screen=ScreenConfig(faces="none", nsfw="none"),
        retrieve=dataclasses.replace(recipe.retrieve, method="sample", neighbours=2),
        engine=EngineConfig("inline"),
    )
    run_steps(curate(config), Inline())
    return config


def test_the_page_says_what_the_tables_say(curation: CurateConfig) -> None:
    text = Path(write_report(curation)).read_text()
    shown = Page(text)
    assert all(address.startswith("data:image/") for address in shown.addresses)
    assert len(shown.addresses) > 20
    assert not re.search(r"https?://(?!arxiv\.org/abs)", text)
    assert "<i>" not in text
    assert len(text) < 5_000_000
    for step in finished_steps(curation):
        counts = step.counts()
        assert step.name in shown.text
        for reason, number in counts.dropped.items():
            assert f"{number:,} {reason}" in shown.text
    assert "No scorer of unsafe images was given" in shown.text
    assert "screen-measures: faces are not looked for; unsafe images are not looked for" in shown.text
    assert "retrieve-decisions: seeds: the 2 nearest images of each of 6 seeds were taken: " in shown.text
    assert {path.name for path in Path(curation.output).glob("report*")} == {"report.html"}
    assert Path(write_report(curation)).read_text() == text


def test_a_report_of_what_is_there_so_far(curation: CurateConfig) -> None:
    other = dataclasses.replace(curation, retrieve=dataclasses.replace(curation.retrieve, neighbours=3))
    names = [step.name for step in finished_steps(other)]
    assert "dedup-decisions" in names
    assert "retrieve-decisions" not in names
    assert "Retrieval" not in Page(Path(write_report(other)).read_text()).text


def test_an_output_whose_name_is_not_utf8(curation: CurateConfig) -> None:
    output = f"{curation.output}\udce9"
    try:
        shutil.copytree(curation.output, output)
    except OSError:
        pytest.skip("this file system refuses such names")
    text = Path(write_report(dataclasses.replace(curation, output=output))).read_text(encoding="utf-8")
    assert r"out &lt;i&gt;\xe9</title>" in text


def test_the_set_can_be_trained_on(curation: CurateConfig, tmp_path: Path) -> None:
    root = run_steps(curate(curation), Inline()).root
    assert len(TarShards(root)) > 5
    tiny = ["--steps=1", "--batch_size=2", "--vit.depth=1", "--data.num_workers=0", "--device=cpu", "--log_every=1"]
    assert main(["pretrain", "photos", "--data.root", root, "--output", str(tmp_path / "run"), *tiny]) == 0


def test_hostile_text_is_escaped() -> None:
    evil = "</figcaption><script>alert(1)</script>"
    for piece in (
        page.figure("data:,", evil),
        page.heading(evil, evil),
        page.subheading(evil),
        histogram(evil, np.ones(3)),
    ):
        assert "<script" not in piece
    assert "<script" not in page.document(evil, [])
    (table,) = list(sections.names([], Fates(remarks=[("a\r.jpg", "")])))[1:]
    assert escape(r"'a\r.jpg'") in table  # a browser would show a.jpg


def test_histograms() -> None:
    assert histogram("none", np.array([np.nan])) == ""
    drawn = histogram("values", np.array([1, 1, 10, 100, np.inf]), logarithmic=True)
    assert "4 values, logarithmic; highest bar 2" in drawn
    Page(drawn)


def test_commands(curation: CurateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "--help"]) == main(["curate"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("laptop", "lvd142m", "extract", "materialize", "--shard"))
    output = str(tmp_path / "out")
    settings = [
        "--images",
        str(curation.images),
        "--output",
        output,
        "--screen.faces",
        "none",
        "--screen.nsfw",
        "none",
        "--engine.kind",
        "inline",
    ]
    assert main(["curate", "dedup", "laptop", *settings]) == 1
    assert "dedup needs all shards of collect-images, but 1 of 1 are missing: run dinov2 curate collect" in (
        capsys.readouterr().err
    )
    for stage in ("extract", "collect", "screen"):
        assert main(["curate", stage, "laptop", *settings]) == 0
        assert ("this curation has nothing to extract" in capsys.readouterr().out) == (stage == "extract")
    assert main(["curate", "run", f"{output}/config.json"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "train on it: dinov2 pretrain vits14_small_data --data.root" in shown
    assert f"report: {output}/report.html" in shown
    assert "screen-measures: faces are not looked for; unsafe images are not looked for" in shown
    before = Path(output, "config.json").read_text()
    for arguments, message in (
        (["fly", "laptop"], "expected run, report or a stage"),
        (["run", "labtop"], "unknown curation 'labtop': did you mean 'laptop'?"),
        (["run", "nothing.json"], "there is no file nothing.json"),
        (["run", "laptop", "--shard", "2/2", "--images", "x"], "shard: expected i/n"),
        (["run", "laptop", "--output", output], "pages, links, images: expected one of them, got none"),
        (["run", "laptop", "--images", str(tmp_path / "no"), "--output", output], "images: expected a folder"),
        (["run", "laptop", *settings, "--seeds", str(tmp_path / "no")], "dinov2 curate: seeds: expected a folder"),
    ):
        assert main(["curate", *arguments]) == 1
        assert message in capsys.readouterr().err
    assert Path(output, "config.json").read_text() == before


def test_any_storage_of_fsspec(curation: CurateConfig) -> None:
    """From a local folder into the memory of this process, which is as remote as an object store: no paths, no maps."""
    config = dataclasses.replace(curation, output="memory://curation")
    root = run_steps(curate(config), Inline()).root
    assert root.startswith("memory://curation/materialize-set-")
    local = TarShards(run_steps(curate(curation), Inline()).root)
    remote = TarShards(root)
    assert [remote.read_bytes(n) for n in range(len(remote))] == [local.read_bytes(n) for n in range(len(local))]
    assert write_report(config) == "memory://curation/report.html"


def test_sources_and_names_are_checked() -> None:
    assert CurateConfig(output="out/").output == "out"
    with pytest.raises(
        ValueError, match="images: expected None with pages, because a curation has one source, got 'b'"
    ):
        CurateConfig(pages="a", images="b")
    with pytest.raises(ValueError, match=r"seeds: expected folders whose last names differ, got \('a/x', 'b/x/'\)"):
        CurateConfig(seeds=("a/x", "b/x/"))
