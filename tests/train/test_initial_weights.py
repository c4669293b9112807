"""Runs that start from weights: a run's, with everything that it had; anyone's, with what is there and fits."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.models import load_pretrained, save_pretrained
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import PretrainConfig, pretrain, read_metrics
from dinov2.train.networks import checkpoint_of, start_from_initial_weights
from dinov2.train.trainer import Trainer


def started(config: PretrainConfig, source: Path) -> tuple[Trainer, str | None]:
    """A trainer that starts from ``source``, and what it says of that."""
    trainer = Trainer(dataclasses.replace(config, initial_weights=source, seed=99))
    return trainer, start_from_initial_weights(trainer.objective, trainer.config)


def tensors_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_a_run_hands_over_all_that_it_learned(config: PretrainConfig, separate: bool) -> None:
    config = dataclasses.replace(config, steps=3, ibot_head=config.dino_head if separate else None)
    run = pretrain(config)
    state = load_checkpoint(checkpoint_of(run))
    assert not tensors_equal(state["student"], state["teacher"])
    for source in (run, checkpoint_of(run)):
        trainer, words = started(config, source)
        assert tensors_equal(trainer.objective.student.state_dict(), state["student"])
        assert tensors_equal(trainer.objective.teacher.state_dict(), state["teacher"])
        assert tensors_equal(dict(trainer.objective.named_buffers()), state["objective"])
        assert words == f"from {checkpoint_of(run)}"


def test_a_backbone_alone(config: PretrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    larger = dataclasses.replace(config, vit=dataclasses.replace(config.vit, img_size=32))
    model = Trainer(larger).products["student"]
    folder = save_pretrained(model, tmp_path / "weights")
    trainer, words = started(config, folder)
    fresh = Trainer(trainer.config).objective.teacher["dino_head"].state_dict()
    for network in (trainer.objective.student, trainer.objective.teacher):
        network["backbone"].eval()
        small = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(network["backbone"](small), model(small))
        assert tensors_equal(network["dino_head"].state_dict(), fresh)
    assert words == f"from {folder}; dino_head starts anew (the weights come without it)"


def test_a_head_of_another_size_starts_anew(config: PretrainConfig) -> None:
    run = pretrain(dataclasses.replace(config, steps=1))
    head = dataclasses.replace(config.dino_head, out_dim=32)
    trainer, words = started(dataclasses.replace(config, dino_head=head, ibot_head=config.dino_head), run)
    state = load_checkpoint(checkpoint_of(run))["teacher"]
    assert words is not None
    assert "; dino_head starts anew (out_dim is 64 there, 32 here); ibot_head starts anew (the weights come" in words
    teacher = trainer.objective.teacher.state_dict()
    assert torch.equal(teacher["backbone.cls_token"], state["backbone.cls_token"])
    assert not trainer.objective.get_buffer("dino_centering.center").any()


def test_continued_pretraining_and_its_resumption(config: PretrainConfig, tmp_path: Path) -> None:
    """The run begins where the weights are, says so, and once it has a checkpoint needs them no more."""
    first = pretrain(dataclasses.replace(config, steps=4))
    source = tmp_path / "source"
    shutil.copytree(first, source)
    lines = read_metrics(first / "metrics.jsonl")
    config = dataclasses.replace(config, initial_weights=source, seed=6)
    whole = pretrain(dataclasses.replace(config, output=tmp_path / "whole"))
    assert read_metrics(whole / "metrics.jsonl")[0]["total"] != lines[0]["total"]
    pretrain(dataclasses.replace(config, output=tmp_path / "stopped", steps=3))
    shutil.rmtree(source)
    resumed = dataclasses.replace(config, output=tmp_path / "stopped")
    assert load_checkpoint(checkpoint_of(pretrain(resumed, resume=True)))["step"] == 8
    with pytest.raises(FileNotFoundError, match="source: no such file"):
        pretrain(dataclasses.replace(config, output=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_another_architecture_says_what_to_set(config: PretrainConfig, tmp_path: Path) -> None:
    run = pretrain(dataclasses.replace(config, steps=1))
    deeper = dataclasses.replace(
        config, output=tmp_path / "new", initial_weights=run, vit=dataclasses.replace(config.vit, depth=3)
    )
    with pytest.raises(ValueError, match=r"depth is 2 there, not 3; .* set --vit\.depth 2"):
        pretrain(deeper)
    assert not deeper.output.exists()


def test_a_run_without_a_checkpoint(config: PretrainConfig, tmp_path: Path) -> None:
    run = pretrain(dataclasses.replace(config, steps=1))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        started(config, run)
    trainer, _ = started(config, run / "teacher")
    assert tensors_equal(trainer.products["student"].state_dict(), load_pretrained(run / "teacher").state_dict())
