"""Several processes distil as one, with the frozen teacher in every process or split among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dinov2.models import load_pretrained
from dinov2.models.checkpoints.run import RunCheckpoint
from dinov2.recipes import distillation
from dinov2.train import DistillConfig, ParallelConfig, PretrainConfig, pretrain
from dinov2.train.networks import start_from_initial_weights
from dinov2.train.processes import Processes
from dinov2.train.saving import CheckpointDirectory, CheckpointSaver
from dinov2.train.sharding import gathered
from dinov2.train.trainer import Trainer
from tests.process_group import in_processes
from tests.train.test_processes import WORLD_SIZE, merged, micro_batches


def distill_beside_one_process(rank: int, world_size: int, directory: Path, config: DistillConfig) -> None:
    torch.set_default_dtype(torch.float64)
    processes = Processes(torch.device("cpu"), rank, world_size, dist.group.WORLD)
    single = Trainer(config)
    whole = merged(config)
    for step in range(2):
        single.step(step, whole)
    expected = single.objective.state_dict()
    for sharding in ("replicate", "full"):
        changed = replace(config, parallel=ParallelConfig(sharding=sharding))
        trainer = Trainer(changed, processes)
        mine = micro_batches(changed, rank)
        for step in range(2):
            trainer.step(step, mine)
        for name, tensor in gathered(trainer.objective.state_dict()).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-9, msg=f"{sharding}: {name}")
        check_state(trainer, Trainer(changed, processes), directory / sharding)
        check_start(trainer, config)
        if sharding == "full":
            part = trainer.objective.teacher["dino_head"].last_layer.weight_v.to_local()
            assert len(part) == 64 // world_size


def check_state(trainer: Trainer, other: Trainer, directory: Path) -> None:
    """What a run saves is taken over; the frozen teacher is not among it."""
    with CheckpointSaver(CheckpointDirectory(directory, keep=1), trainer.processes) as saver:
        saver.save(2, trainer.state_dict(), {})
    checkpoint = RunCheckpoint(CheckpointDirectory(directory, keep=1).path(2))
    assert not any(name.startswith(("teacher.backbone", "student.backbone")) for name in checkpoint.tensors)
    other.restore(checkpoint)
    state, taken = gathered(trainer.objective.state_dict()), gathered(other.objective.state_dict())
    assert all(torch.equal(taken[name], tensor) for name, tensor in state.items())
    for name, backbone in trainer.finished_backbones().items():
        assert torch.equal(state[f"_average.{name}.backbone.cls_token"], backbone.cls_token)


def check_start(trainer: Trainer, config: DistillConfig) -> None:
    """Whole weights of a file reach networks that may be split."""
    start = config.frozen_teacher / "teacher"
    start_from_initial_weights(trainer.objective, replace(config, initial_weights=start))
    expected = load_pretrained(start).state_dict()
    for network in (trainer.objective.student, trainer.objective.average):
        state = gathered(network.state_dict())
        for name, tensor in expected.items():
            assert torch.equal(state[f"a.backbone.{name}"], tensor.double()), name


def test_two_processes_distil_as_one(config: PretrainConfig, tmp_path: Path) -> None:
    teacher = pretrain(replace(config, steps=1))
    published = distillation(teacher, ["vit_small"])
    student = replace(config.vit, drop_path_rate=0.0, init_values=1.0)
    distill = replace(
        published,
        output=tmp_path / "distilled",
        students={"a": student, "b": student},
        steps=8,
        batch_size=8,
        accumulation_steps=2,
        precision="fp32",
        objective=config.objective,
        device="cpu",
    )
    in_processes(WORLD_SIZE, tmp_path, distill_beside_one_process, tmp_path, distill)
