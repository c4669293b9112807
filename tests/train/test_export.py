"""Export: any checkpoint, either network, with heads; nothing is overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.cli import main
from dinov2.models import VisionTransformer, ViTConfig, load_pretrained, read_weights
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import PretrainConfig, pretrain
from dinov2.train.networks import checkpoint_of, export


def backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(first), dict(second), rtol=0, atol=0)


@pytest.fixture
def run(config: PretrainConfig) -> Path:
    """A run of 6 steps with checkpoints of steps 3 and 6."""
    return pretrain(replace(config, steps=6))


def test_the_newest_teacher(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "new" / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    model, finished = load_pretrained(folder), load_pretrained(run / "teacher")
    assert model.config == finished.config
    assert_equal(model.state_dict(), finished.state_dict())


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_an_earlier_checkpoint_with_its_heads(run: Path, tmp_path: Path, network: str) -> None:
    state = load_checkpoint(checkpoint_of(run, 3))
    folder = export(run, tmp_path / "out", network=network, step=3, heads=True)
    assert_equal(load_pretrained(folder).state_dict(), backbone(state[network]))
    weights = read_weights(folder)
    assert_equal(weights.named_tensors(), state[network])
    assert_equal(
        {"dino_centering.center": weights.centers["dino_loss.center"][0]},
        {"dino_centering.center": state["objective"]["dino_centering.center"]},
    )
    again = export(checkpoint_of(run, 3), tmp_path / "again", network=network, heads=True)
    assert_equal(read_weights(again).named_tensors(), state[network])


def test_weights_of_others(tmp_path: Path) -> None:
    model = VisionTransformer(ViTConfig(embed_dim=64, num_heads=1, depth=1))
    torch.save({"teacher": {f"backbone.{name}": x for name, x in model.state_dict().items()}}, tmp_path / "t.pth")
    assert_equal(load_pretrained(export(tmp_path / "t.pth", tmp_path / "out")).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"t\.pth has no heads to export"):
        export(tmp_path / "t.pth", tmp_path / "heads", heads=True)
    assert not (tmp_path / "heads").exists()


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 4; it has those of 3, 6"):
        export(run, tmp_path / "out", step=4)
    with pytest.raises(ValueError, match="step: expected None for a source that is not a run directory, got"):
        export(run / "teacher", tmp_path / "out", step=4)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        export(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--heads", "--step", "3"]) == 0
    assert f"wrote config.json, heads.safetensors, model.safetensors to {tmp_path / 'out'}" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert "is not empty: choose a new one" in capsys.readouterr().err
