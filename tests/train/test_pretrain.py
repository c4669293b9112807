"""Whole runs: what they leave behind, what they refuse, and that they learn."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.models import load_pretrained
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import NonFiniteError, PretrainConfig, pretrain, read_metrics
from dinov2.train.trainer import Trainer, micro_batch_seed


def tensors_equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves_behind(config: PretrainConfig) -> None:
    output = pretrain(config)
    assert output == config.output
    written = json.loads((output / "config.json").read_text())
    assert written["vit"]["embed_dim"] == 32
    assert written["data"]["augmentation"]["local_crops"] == 2

    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"total", "koleo", "lr", "teacher_momentum", "grad_norm/backbone", "target_entropy"} <= lines[0].keys()
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert list((output / "tensorboard").iterdir())

    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000008"]
    teacher = load_pretrained(output / "teacher")
    last = load_checkpoint(output / "checkpoints" / names[-1])["teacher"]
    backbone = {name.removeprefix("backbone."): value for name, value in last.items() if name.startswith("backbone.")}
    assert tensors_equal(teacher.state_dict(), backbone)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_is_learned(config: PretrainConfig, precision: str) -> None:
    """Against a teacher that stands still, the same batch again and again: every term falls.

    Balanced targets, because a running centre makes the task harder at first; LayerScale at 1, because at 1e-5 a new
    network hardly sees its images; no stochastic depth, because KoLeo of so few images would follow the draws.
    """
    trainer = Trainer(
        dataclasses.replace(
            config,
            precision=precision,
            steps=60,
            batch_size=16,
            vit=dataclasses.replace(config.vit, init_values=1.0, drop_path_rate=0.0),
            objective=dataclasses.replace(config.objective, centering="sinkhorn_knopp"),
            optim=dataclasses.replace(config.optim, warmup_fraction=0.0, freeze_last_layer_fraction=0.0),
            teacher=dataclasses.replace(config.teacher, momentum=1.0, temperature_start=0.07),
        )
    )
    batch = next(some_batches(trainer.config))
    losses = [trainer.step(step, iter([batch])) for step in range(40)]
    for term in ("dino_local", "dino_global", "koleo", "ibot", "total"):
        first, last = (float(sum(loss[term] for loss in part)) / 4 for part in (losses[:4], losses[-4:]))
        assert last < first - 0.05, term


def test_precisions_agree_and_bf16_rounds(config: PretrainConfig) -> None:
    full, half = (
        read_metrics(
            pretrain(dataclasses.replace(config, steps=1, output=config.output / precision, precision=precision))
            / "metrics.jsonl"
        )[0]
        for precision in ("fp32", "bf16")
    )
    for term in ("dino_local", "dino_global", "ibot"):
        assert half[term] == pytest.approx(full[term], rel=0.01)
        assert half[term] != full[term]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_on_photographs(config: PretrainConfig, precision: str) -> None:
    lines = read_metrics(pretrain(dataclasses.replace(config, steps=20, precision=precision)) / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(0 < line["total"] < 20 for line in lines)
    weights = load_checkpoint(config.output / "checkpoints" / "step_00000020")["student"]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_learning_rate_zero_changes_nothing(config: PretrainConfig) -> None:
    trainer = Trainer(dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_fraction=0.5)))
    before = {name: tensor.clone() for name, tensor in trainer.objective.student.state_dict().items()}
    trainer.step(0, some_batches(config))  # the first step of the warm-up
    assert tensors_equal(before, trainer.objective.student.state_dict())


def test_frozen_prototypes_stand_still_and_then_move(config: PretrainConfig) -> None:
    trainer = Trainer(config)  # frozen for the first 2 of 8 steps
    prototypes = trainer.objective.student["dino_head"].last_layer.weight_v
    start = prototypes.clone()
    for step in (0, 1):
        trainer.step(step, some_batches(config))
    assert torch.equal(prototypes, start)
    trainer.step(2, some_batches(config))
    assert not torch.equal(prototypes, start)


def test_teacher_follows_by_the_momentum(config: PretrainConfig) -> None:
    trainer = Trainer(config)
    teacher = {name: tensor.clone() for name, tensor in trainer.objective.teacher.named_parameters()}
    trainer.step(4, some_batches(config))
    momentum = trainer.schedules(4).teacher_momentum
    for name, student in trainer.objective.student.named_parameters():
        expected = momentum * teacher[name] + (1 - momentum) * student
        torch.testing.assert_close(trainer.objective.teacher.get_parameter(name), expected, atol=1e-7, rtol=1e-6)


def some_batches(config: PretrainConfig, start: int = 0):
    from dinov2.data import batches, open_dataset

    return batches(
        open_dataset(config.data),
        config.data,
        batch_size=config.micro_batch_size,
        patch_size=config.patch_size,
        seed=config.seed,
        start_step=start,
    )


def gradients(config: PretrainConfig, micro_batches) -> dict[str, torch.Tensor]:
    """Gradients of one step, before clipping and whatever the optimiser did with them."""
    unclipped = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_grad_norm=1e9))
    trainer = Trainer(unclipped)
    trainer.step(0, micro_batches)
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer.objective.student.named_parameters()
        if parameter.grad is not None
    }


def test_accumulated_gradient_is_the_mean_over_micro_batches(config: PretrainConfig) -> None:
    # Sinkhorn-Knopp carries nothing from one batch to the next; without drop path no random numbers are drawn.
    config = dataclasses.replace(
        config,
        vit=dataclasses.replace(config.vit, drop_path_rate=0.0),
        objective=dataclasses.replace(config.objective, centering="sinkhorn_knopp"),
    )
    first, second = (gradients(config, some_batches(config, start)) for start in (0, 1))
    together = dataclasses.replace(config, batch_size=8, accumulation_steps=2)
    accumulated = gradients(together, some_batches(together))
    for name, gradient in accumulated.items():
        torch.testing.assert_close(gradient, (first[name] + second[name]) / 2, atol=1e-7, rtol=1e-5, msg=name)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_each_module_is_clipped_on_its_own(config: PretrainConfig) -> None:
    limit = 1e-3  # below every module's norm
    trainer = Trainer(dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip_grad_norm=limit)))
    scalars = trainer.step(0, some_batches(config))
    for name, module in trainer.objective.student.items():
        norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        assert scalars[f"grad_norm/{name}"] > limit, "the norm before clipping is what is logged"
        assert norm.item() == pytest.approx(limit, rel=1e-3)


def test_probe_sees_the_teacher_at_the_start_on_the_way_and_at_the_end(config: PretrainConfig) -> None:
    calls = []

    def probe(model) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(7)  # must not disturb the run
        calls.append(model(torch.zeros(1, 3, 16, 16)).norm().item())
        return {"knn_accuracy": 0.5}

    probed = read_metrics(pretrain(dataclasses.replace(config, probe_every=5), probe=probe) / "metrics.jsonl")
    assert [line["step"] for line in probed if "knn_accuracy" in line] == [0, 5, 8]
    assert len(set(calls)) == 3, "the teacher moves"
    plain = read_metrics(pretrain(dataclasses.replace(config, output=config.output / "plain")) / "metrics.jsonl")
    assert [line["total"] for line in plain] == [line["total"] for line in probed if "total" in line]


def test_own_dataset(config: PretrainConfig) -> None:
    class Noise:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> np.ndarray:
            return np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)

    output = pretrain(dataclasses.replace(config, steps=1), dataset=Noise())
    assert load_checkpoint(output / "checkpoints" / "step_00000001")["num_images"] == 4


@pytest.mark.parametrize("log_every", [1, 4])
def test_nan_stops_the_run_with_the_term_the_step_and_the_checkpoint(
    config: PretrainConfig, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinov2.objectives import SelfDistillation

    forward, calls = SelfDistillation.forward, []

    def poisoned(self, batch, temperature):
        calls.append(1)
        terms = forward(self, batch, temperature)
        if len(calls) == 5:
            terms["koleo"] = terms["koleo"] * float("nan")
            terms["total"] = terms["total"] + terms["koleo"]
        return terms

    monkeypatch.setattr(SelfDistillation, "forward", poisoned)
    with pytest.raises(NonFiniteError, match=r"in step 5 koleo is nan.*last good checkpoint is .*step_00000003"):
        pretrain(dataclasses.replace(config, log_every=log_every))
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_spoilt_weight_is_never_saved(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def spoils(self, number, micro_batches):
        scalars = step(self, number, micro_batches)
        if number == 5:
            self.objective.student["backbone"].cls_token.data[0, 0, 0] = float("inf")
        return scalars

    monkeypatch.setattr(Trainer, "step", spoils)
    with pytest.raises(NonFiniteError, match=r"after step 6 the tensor student\.backbone\.cls_token holds NaN"):
        pretrain(config)
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_directory_in_use_is_refused(config: PretrainConfig) -> None:
    config.output.mkdir()
    (config.output / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"run is not empty: continue the run in it with --resume"):
        pretrain(config)
    with pytest.raises(ValueError, match=r"cannot resume in .*: it holds files, but no config\.json"):
        pretrain(config, resume=True)
    assert [path.name for path in config.output.iterdir()] == ["notes.txt"]


def test_input_errors_leave_no_directory(config: PretrainConfig, tmp_path: Path) -> None:
    empty = tmp_path / "images"
    empty.mkdir()
    with pytest.raises(ValueError, match="root: expected a folder with images"):
        pretrain(dataclasses.replace(config, data=dataclasses.replace(config.data, root=empty)))
    uneven = dataclasses.replace(config.data.augmentation, global_size=18)
    with pytest.raises(ValueError, match="global_size: expected a multiple of the patch size 8, got 18"):
        pretrain(dataclasses.replace(config, data=dataclasses.replace(config.data, augmentation=uneven)))
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, r"koleo_weight: expected 0 .* batch_size 1 / accumulation_steps 1, got"),
        ({"batch_size": 4, "accumulation_steps": 4}, "batch_size 4 / accumulation_steps 4, got"),
        ({"batch_size": 5, "accumulation_steps": 2}, "expected a multiple of accumulation_steps = 2, got 5"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: expected at least 1"),
        ({"precision": "fp8"}, "precision: expected one of auto, fp32, bf16, fp16, got 'fp8'"),
    ],
)
def test_impossible_configurations(config: PretrainConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_one_image_without_koleo_is_fine(config: PretrainConfig) -> None:
    objective = dataclasses.replace(config.objective, koleo_weight=0.0)
    pretrain(dataclasses.replace(config, batch_size=1, steps=1, objective=objective))


def test_seeds_of_micro_batches_differ() -> None:
    assert len({micro_batch_seed(seed, number) for seed in range(20) for number in range(20)}) == 400
