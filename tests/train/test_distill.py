"""Distillation runs: several students of one frozen teacher, what they leave behind, and that they go on exactly."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.models import ViTConfig, load_pretrained
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.recipes import distillation
from dinov2.train import DistillConfig, PretrainConfig, pretrain, read_metrics
from dinov2.train.networks import checkpoint_of, export, read_networks, read_teacher, start_from_initial_weights
from dinov2.train.run_directory import read_config
from dinov2.train.trainer import Trainer
from tests.train.graphed_runs import STEPS, assert_close, draw, steps
from tests.train.recorded_graph import RecordedGraph


def tensors_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def teacher(config: PretrainConfig) -> Path:
    """A run of one step: a teacher with heads and a centre."""
    return pretrain(replace(config, steps=1, vit=replace(config.vit, embed_dim=48, depth=3)))


@pytest.fixture
def distill(config: PretrainConfig, teacher: Path, tmp_path: Path) -> DistillConfig:
    """6 steps of two students."""
    published = distillation(teacher, ["vit_small", "vit_base"])
    narrow = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    students = {
        "narrow": replace(published.students["vit_small"], **narrow),
        "deep": replace(published.students["vit_base"], **narrow | {"depth": 2}),
    }
    return replace(
        published,
        output=tmp_path / "distilled",
        students=students,
        steps=6,
        batch_size=4,
        accumulation_steps=1,
        precision="fp32",
        objective=config.objective,
        device="cpu",
        log_every=1,
        checkpoint_every=3,
    )


def test_what_a_run_leaves_behind(distill: DistillConfig, teacher: Path) -> None:
    output = pretrain(distill)
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {"narrow/ibot", "deep/koleo", "total", "grad_norm/deep/backbone", "target_entropy"} <= lines[0].keys()
    state = load_checkpoint(checkpoint_of(output))
    assert {name.split(".")[0] for role in ("student", "teacher") for name in state[role]} == {"narrow", "deep"}
    before = Trainer(distill).objective.averages
    for name, vit in distill.students.items():
        model = load_pretrained(output / "students" / name)
        assert model.config == vit
        average = {
            key.removeprefix(f"{name}.backbone."): x for key, x in state["teacher"].items() if f"{name}.b" in key
        }
        assert tensors_equal(model.state_dict(), average)
        assert not torch.equal(model.cls_token, before[name]["backbone"].cls_token)
        assert torch.equal(read_networks(output, student=name).teacher.backbone["cls_token"], model.cls_token)
    assert json.loads((output / "config.json").read_text())["frozen_teacher"] == str(teacher)


def test_the_teacher_stands_still_with_its_heads_and_centres(distill: DistillConfig, teacher: Path) -> None:
    trainer = Trainer(distill)
    state = load_checkpoint(checkpoint_of(teacher))
    assert tensors_equal(trainer.objective.teacher.state_dict(), state["teacher"])
    assert tensors_equal(dict(trainer.objective.named_buffers()), state["objective"])
    assert trainer.objective.get_buffer("dino_centering.center").any()


def test_a_stopped_run_goes_on_exactly_with_the_same_teacher_alone(
    distill: DistillConfig, teacher: Path, tmp_path: Path
) -> None:
    whole = pretrain(replace(distill, output=tmp_path / "whole"))
    state = load_checkpoint(checkpoint_of(whole))
    stopped = pretrain(replace(distill, steps=6, checkpoint_every=4))
    (stopped / "checkpoints").rename(tmp_path / "checkpoints")
    (stopped / "checkpoints").mkdir()
    shutil.move(checkpoint_of_step(tmp_path / "checkpoints", 4), stopped / "checkpoints")

    moved = export(teacher, tmp_path / "moved", heads=True)  # the same weights in another place and form
    resumed = replace(distill, frozen_teacher=moved)
    pretrain(replace(resumed, checkpoint_every=4), resume=True)
    again = load_checkpoint(checkpoint_of(stopped))
    assert again["step"] == 6
    assert all(tensors_equal(state[part], again[part]) for part in ("student", "teacher", "objective"))

    shutil.rmtree(moved)
    other = pretrain(replace(teacher_config(teacher), output=tmp_path / "other", seed=8))
    with pytest.raises(ValueError, match=r"frozen_teacher: expected the teacher of this run, .* got .*other"):
        pretrain(replace(resumed, checkpoint_every=4, frozen_teacher=other), resume=True)
    with pytest.raises(FileNotFoundError, match="moved"):
        pretrain(replace(resumed, checkpoint_every=4), resume=True)


def checkpoint_of_step(directory: Path, step: int) -> Path:
    return next(path for path in directory.iterdir() if f"{step:08d}" in path.name)


def teacher_config(run: Path) -> PretrainConfig:
    config = read_config(run)
    assert isinstance(config, PretrainConfig)
    return config


def test_one_of_the_students_is_exported_with_its_heads(distill: DistillConfig, tmp_path: Path) -> None:
    run = pretrain(replace(distill, steps=1))
    with pytest.raises(ValueError, match=r"student: expected one of narrow, deep, .* got None; or export one"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match=r"student: expected one of narrow, deep, .* got 'wide'"):
        export(run, tmp_path / "out", student="wide")
    export(run, tmp_path / "out", student="deep", heads=True)
    assert read_teacher(tmp_path / "out").vit.depth == 2


def test_a_student_that_starts_from_weights(distill: DistillConfig, tmp_path: Path) -> None:
    first = pretrain(replace(distill, steps=1))
    second = Trainer(replace(distill, initial_weights=first, seed=9))
    assert start_from_initial_weights(second.objective, second.config) == f"from {checkpoint_of(first)}"
    state = load_checkpoint(checkpoint_of(first))
    assert tensors_equal(second.objective.student.state_dict(), state["student"])
    assert tensors_equal(second.objective.average.state_dict(), state["teacher"])


def test_a_teacher_without_heads_is_refused(teacher: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher has no heads, so it cannot teach: .*dinov2 export --heads"):
        distillation(teacher / "teacher", ["vit_small"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": {}}, "students: expected at least one student"),
        ({"students": {"a.b": ViTConfig(patch_size=8)}}, r"names of letters, digits and underscores, got \['a\.b'\]"),
        (
            {"students": {"a": ViTConfig(patch_size=8), "b": ViTConfig()}},
            r"students: expected patches of one size, got \{'a': 8, 'b': 14\}",
        ),
        ({"students": {"a": ViTConfig(patch_size=8, in_chans=4)}}, r"students\.a\.in_chans: expected 3, .* got 4"),
    ],
)
def test_impossible_configurations(distill: DistillConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(distill, **changes)


def test_students_that_do_not_fit_the_teacher(distill: DistillConfig) -> None:
    head = replace(distill.dino_head, out_dim=32)
    with pytest.raises(ValueError, match="expected the student's 32 prototypes in dino_head, got 64"):
        pretrain(replace(distill, dino_head=head))
    students = {name: replace(vit, patch_size=4) for name, vit in distill.students.items()}
    with pytest.raises(ValueError, match="expected the teacher's patches of 8 pixels, got 4"):
        pretrain(replace(distill, students=students))
    assert not distill.output.exists()


def test_steps_can_be_replayed(distill: DistillConfig) -> None:
    """The steps of all students in the same graphs; masks play no part, so their number may change.

    LayerScale starts at 1: at 1e-5 a new network hardly tells two images apart, and KoLeo's gradients are huge.
    """
    students = {name: replace(vit, init_values=1.0) for name, vit in distill.students.items()}
    distill = replace(distill, steps=STEPS, students=students)
    replayed, eager = Trainer(distill), Trainer(distill)
    replayed.replay_steps(RecordedGraph)
    replace(distill, cuda_graph=True)  # is no error, though data.masks.same_total is False
    drawn = draw(distill)
    for ours, theirs in zip(steps(replayed, drawn), steps(eager, drawn), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
