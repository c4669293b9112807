"""A configuration survives its file: every recipe, every type of field; what is no configuration says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dinov2.configuration import to_json
from dinov2.models import ViTConfig
from dinov2.recipes import RECIPES, recipe
from dinov2.train import DistillConfig, RunConfig
from dinov2.train.run_directory import is_run, read_config, write_config

DISTILLATION = DistillConfig(
    output=Path("d"), steps=1, batch_size=2, students={"a": ViTConfig(), "b": ViTConfig(depth=3)}
)


@pytest.mark.parametrize("config", [*map(recipe, RECIPES), DISTILLATION], ids=[*RECIPES, "distillation"])
def test_round_trip(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, output=tmp_path / "run", initial_weights=Path("somewhere"))
    write_config(config)
    assert is_run(config.output)
    read = read_config(config.output)
    assert type(read) is type(config)
    assert read.data.augmentation == config.data.augmentation
    assert replace(read, data=config.data) == config
    assert to_json(read) == to_json(config)  # data.root may become a string, which is as good


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the directory of a run: it has no config\.json"):
        read_config(tmp_path)
    for content in ("", "[]", "{}", json.dumps({"model_type": "dinov2"})):
        (tmp_path / "config.json").write_text(content)
        assert not is_run(tmp_path)
        with pytest.raises(ValueError, match="is not the configuration of a run"):
            read_config(tmp_path)


def test_a_field_that_is_not_known(tmp_path: Path) -> None:
    config = replace(recipe("photos"), output=tmp_path)
    write_config(config)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["seed"]  # as an earlier version would have written it
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == config
    values["vit"]["colour"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"is not the configuration of a run: .*colour"):
        read_config(tmp_path)
