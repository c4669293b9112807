"""What no configuration needs goes, and nothing else: not what a run may read, what is not ours, or is linked."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from dinov2.cli import main
from dinov2.curate import CurateConfig, curate, run_steps
from dinov2.curate.cleaning import leftovers
from dinov2.curate.engines import Inline
from dinov2.curate.pipeline import save_config
from dinov2.curate.screen import ScreenConfig
from dinov2.data import TarShards
from dinov2.recipes import laptop
from tests.curate.pictures import encoded, picture
from tests.curate.test_runner import contents


@pytest.fixture
def config(tmp_path: Path) -> CurateConfig:
    """A curation that has ended; another one, with the same output, has not even begun."""
    (tmp_path / "images").mkdir()
    for seed in range(6):
        (tmp_path / "images" / f"{seed}.png").write_bytes(encoded(picture(seed)))
    config = dataclasses.replace(
        laptop(), output=str(tmp_path / "out"), images=str(tmp_path / "images"), screen=ScreenConfig(faces="none")
    )
    save_config(config)
    run_steps(curate(config), Inline())
    return config


def clean(output: Path, *options: str) -> int:
    return main(["curate", "clean", str(output / "config.json"), *options])


def test_what_goes(config: CurateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, calm = tmp_path / "out", contents(tmp_path / "out")
    assert clean(output, "--yes") == 0
    assert "removed 0 folders" in capsys.readouterr().out
    assert contents(output) == calm

    other = dataclasses.replace(config, screen=dataclasses.replace(config.screen, min_side=65))
    set_of_other = run_steps(curate(other), Inline()).root
    mixed = contents(output)
    assert leftovers([config, other]).folders == {}
    found = leftovers([config])
    assert {Path(path).name.partition("-")[0] for path in found.folders} >= {"screen", "dedup", "materialize"}
    assert list(found.final_sets) == [set_of_other]
    assert clean(output) == 0
    assert f"{len(found.folders)} folders and 0 half-written files" in capsys.readouterr().out
    assert contents(output) == mixed

    file = tmp_path / "other.json"
    (output / "config.json").replace(file)
    save_config(other)
    (output / "config.json").replace(tmp_path / "out" / "kept.json")
    file.replace(output / "config.json")
    assert clean(output, "--keep", str(output / "kept.json"), "--yes") == 0
    (output / "kept.json").unlink()
    assert contents(output) == mixed

    assert clean(output, "--yes") == 0
    assert f"{set_of_other}, a final set of" in capsys.readouterr().out
    assert len(TarShards(set_of_other)) == 6
    assert clean(output, "--yes", "--final_sets") == 0
    assert contents(output) == calm
    run_steps(curate(other), Inline())  # notes of what went mislead nobody
    assert contents(output) == mixed


def test_what_stays(config: CurateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    step = next(output.glob("screen-decisions-*"))
    (step / "00000.parquet.0a1b2c3d.partial").write_bytes(b"half")
    digest = "-0123456789"
    elsewhere = tmp_path / "elsewhere"
    names = [f"{name}{digest}" for name in ("mine", "odd", "used")]
    for folder in (elsewhere, output / "mine", *(output / name for name in names)):
        (folder / "about").mkdir(parents=True)
        (folder / "about" / "step.json").write_text(json.dumps({"name": "mine"}))
    (output / f"mine{digest}" / "about" / "step.json").write_text("[]")
    (output / f"used{digest}" / "about" / "step.json").write_text(json.dumps({"name": "used"}))
    os.symlink(elsewhere, output / f"elsewhere{digest}")
    os.symlink(elsewhere, output / f"used{digest}" / "link")
    found = leftovers([config])
    assert list(found.folders) == [f"{output}/used{digest}"]
    assert found.links == [f"{output}/elsewhere{digest}"]
    assert clean(output, "--yes") == 0
    assert "which is a link" in capsys.readouterr().out
    assert not (output / f"used{digest}").exists()
    assert (elsewhere / "about" / "step.json").exists()
    assert not list(output.rglob("*.partial"))
    assert {path.name for path in output.glob(f"*{digest}")} == {*names[:2], f"elsewhere{digest}"}

    next(step.glob("*.json")).unlink()
    assert clean(output, "--yes") == 1
    message = "expected a curation that has ended, but 1 of 1 shards of screen-decisions are missing"
    assert message in capsys.readouterr().err


def test_a_source_within_the_output_stays(config: CurateConfig, tmp_path: Path) -> None:
    collected = next((tmp_path / "out").glob("collect-images-*"))
    other = dataclasses.replace(config, images=str(collected), screen=ScreenConfig(faces="none", min_side=65))
    run_steps(curate(other), Inline())
    assert str(collected) not in leftovers([other]).folders
    assert leftovers([other]).folders
