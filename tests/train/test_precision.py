"""float16 with a scaled loss, and what "auto" becomes."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from dinov2.data import batches, open_dataset
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import NonFiniteError, PretrainConfig, pretrain, read_metrics
from dinov2.train.metrics import StepScalars
from dinov2.train.precision import definite, settle_precision
from dinov2.train.trainer import Trainer


@pytest.fixture
def half(config: PretrainConfig) -> PretrainConfig:
    """LayerScale starts at 1: at 1e-5 a new network hardly tells two images apart, and KoLeo's gradients are huge."""
    return dataclasses.replace(config, precision="fp16", vit=dataclasses.replace(config.vit, init_values=1.0))


def scaled(config: PretrainConfig, scale: float) -> Trainer:
    """A trainer whose loss scale is ``scale``; that at which others start is too large for so small a network."""
    trainer = Trainer(config)
    if trainer.arithmetic.scaler is not None:
        trainer.arithmetic.load_state_dict(trainer.arithmetic.state_dict() | {"scale": scale})
    return trainer


def micro_batches(config: PretrainConfig):
    size, patch_size = config.micro_batch_size, config.vit.patch_size
    return batches(open_dataset(config.data), config.data, batch_size=size, patch_size=patch_size, seed=config.seed)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.state_dict() | {"loss_scale": None})


def flat(state, prefix=""):
    if isinstance(state, dict):
        return {name: value for key, item in state.items() for name, value in flat(item, f"{prefix}{key}.").items()}
    return {prefix: state} if isinstance(state, torch.Tensor) else {}


def test_float16_trains_as_float32_does(half: PretrainConfig) -> None:
    expected, actual = (scaled(dataclasses.replace(half, precision=precision), 8.0) for precision in ("fp32", "fp16"))
    streams = [micro_batches(half) for _ in range(2)]
    for step in range(4):
        first, second = (
            trainer.step(step, stream) for trainer, stream in zip((expected, actual), streams, strict=True)
        )
        assert second.pop("skipped") == 0
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0.02, atol=2e-3, msg=name)
            assert second[name] != value or name == "koleo", "float16 rounds"


def test_gradients_are_those_of_the_unscaled_loss(half: PretrainConfig) -> None:
    first, second = (scaled(half, scale).step(0, micro_batches(half)) for scale in (1.0, 16.0))
    for name in ("grad_norm/backbone", "grad_norm/dino_head"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=0)


def test_a_step_that_overflows_changes_nothing_but_the_scale(half: PretrainConfig) -> None:
    trainer, stream = scaled(half, 8.0), micro_batches(half)
    trainer.step(4, stream)  # one that moves the student away from the teacher
    before = {name: value for name, value in flat(weights(trainer)).items() if not name.startswith("objective.")}
    state = trainer.arithmetic.state_dict()
    trainer.arithmetic.load_state_dict(state | {"scale": 2.0**40})
    scalars = trainer.step(5, stream)
    assert scalars["skipped"] == 1
    assert not scalars["grad_norm/backbone"].isfinite()
    after = flat(weights(trainer))
    assert len(before) > 100
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert trainer.arithmetic.metrics() == {"loss_scale": 2.0**39}
    trainer.arithmetic.load_state_dict(state)
    assert trainer.step(6, stream)["skipped"] == 0
    assert not torch.equal(flat(weights(trainer))["student.backbone.pos_embed."], before["student.backbone.pos_embed."])


def test_a_skipped_step_is_no_error_and_no_part_of_mean_norms() -> None:
    scalars = StepScalars()
    for norm, skipped in ((2.0, 0.0), (float("inf"), 1.0), (4.0, 0.0)):
        row = {"total": 1.0, "grad_norm/backbone": norm, "skipped": skipped}
        scalars.append({name: torch.tensor(value) for name, value in row.items()})
    scalars.check_finite(3, lambda: None)
    assert scalars.means() == {"total": 1.0, "grad_norm/backbone": 3.0, "skipped": 1 / 3}


def test_an_infinite_loss_or_a_gradient_of_a_step_that_counts_is_an_error() -> None:
    for row in ({"total": float("inf"), "skipped": 1.0}, {"grad_norm/backbone": float("nan"), "skipped": 0.0}):
        scalars = StepScalars()
        scalars.append({name: torch.tensor(value) for name, value in row.items()})
        with pytest.raises(NonFiniteError, match="in step 1 "):
            scalars.check_finite(1, lambda: None)


def test_an_interval_of_skipped_steps_has_no_norms() -> None:
    scalars = StepScalars()
    scalars.append({"grad_norm/backbone": torch.tensor(float("nan")), "skipped": torch.tensor(1.0)})
    assert scalars.means() == {"skipped": 1.0}


def test_the_loss_scale_is_logged_saved_and_continued(half: PretrainConfig) -> None:
    pretrain(dataclasses.replace(half, steps=3))
    line = read_metrics(half.output / "metrics.jsonl")[-1]
    assert line["skipped"] == 1
    assert line["loss_scale"] == 2.0**13, "halved by each of three steps that overflowed"
    assert load_checkpoint(half.output / "checkpoints" / "step_00000003")["loss_scale"]["scale"] == 2.0**13
    pretrain(dataclasses.replace(half, steps=4), resume=True)
    assert read_metrics(half.output / "metrics.jsonl")[-1]["loss_scale"] == 2.0**12


def test_auto_is_bf16_on_a_gpu_and_fp32_on_a_cpu(config: PretrainConfig) -> None:
    assert config.precision == "auto"
    assert definite("auto", torch.device("cuda")) == "bf16"
    assert definite("auto", torch.device("cpu")) == "fp32"
    assert definite("fp16", torch.device("cpu")) == "fp16"


def test_a_resumed_run_keeps_the_precision_it_was_started_with(config: PretrainConfig) -> None:
    pretrain(dataclasses.replace(config, steps=1, precision="bf16"))
    assert settle_precision(config, torch.device("cpu")).precision == "bf16"
    pretrain(dataclasses.replace(config, steps=2), resume=True)
    assert json.loads((config.output / "config.json").read_text())["precision"] == "bf16"
    with pytest.raises(ValueError, match='precision: was "bf16", now "fp32"'):
        pretrain(dataclasses.replace(config, precision="fp32"), resume=True)


def test_a_loss_scale_below_1_ends_the_run(half: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 0.5)
    with pytest.raises(NonFiniteError, match=r"overflow float16 even at a loss scale of 0\.5; .* no checkpoint was"):
        pretrain(half)
