"""Steps that are replayed as CUDA graphs, on a GPU: `make test-gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.train import PretrainConfig
from dinov2.train.trainer import Trainer
from tests.train.graphed_runs import (
    REPLAYED,
    STEPS,
    assert_close,
    copied_state,
    draw,
    flat_state,
    resume,
    steps,
    with_static_shapes,
)

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

CHANGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bf16"},
    "sinkhorn, accumulated": {
        "objective": ObjectiveConfig(centering="sinkhorn_knopp"),
        "accumulation_steps": 3,
        "batch_size": 12,
        "ibot_head": HeadConfig(out_dim=48, hidden_dim=64, bottleneck_dim=32),
    },
    "recomputed logits": {"objective": ObjectiveConfig(student_logits="recomputed")},
}


def on_gpu(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """Networks with heads of 64 channels, as the attention of real ones."""
    vit = ViTConfig(img_size=16, patch_size=8, embed_dim=128, depth=3, num_heads=2, drop_path_rate=0.3)
    return with_static_shapes(replace(config, device="cuda", vit=vit, precision="fp32", cuda_graph=False), **changes)


@pytest.fixture(params=CHANGES.values(), ids=CHANGES.keys())
def run(request: pytest.FixtureRequest, config: PretrainConfig) -> PretrainConfig:
    return on_gpu(config, **request.param)


def graphed(config: PretrainConfig) -> Trainer:
    return Trainer(replace(config, cuda_graph=True))


def test_replayed_steps_are_eager_steps(run: PretrainConfig) -> None:
    """Losses, weights, moments and averages; only rates, decay and momentum are rounded otherwise."""
    drawn, trainer, eager = draw(run), graphed(run), Trainer(run)
    tolerance = 2e-2 if run.precision == "bf16" else 1e-3
    before = copied_state(trainer)
    for ours, theirs in zip(steps(trainer, drawn), steps(eager, drawn), strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    after = flat_state(trainer)
    assert all((after[name] != before[name]).any() for name in before)
    expected = flat_state(eager)
    for network in ("student.", "teacher."):
        names = [name for name in expected if name.startswith(network)]
        off, moved = (
            torch.stack([(expected[name] - other[name]).norm() for name in names]).norm() for other in (after, before)
        )
        assert off <= (0.1 if run.precision == "bf16" else 0.01) * moved


@pytest.mark.needs_values
def test_a_resumed_run_repeats_the_uninterrupted_one(run: PretrainConfig, tmp_path: Path) -> None:
    """Its warm-up falls on other steps, and changes nothing."""
    drawn, whole, first, second = draw(run), *(graphed(run) for _ in range(3))
    expected = list(steps(whole, drawn))
    middle = REPLAYED + 1
    for ours, theirs in zip(steps(first, drawn, end=middle), expected, strict=False):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    resume(first, second, middle, tmp_path)
    for ours, theirs in zip(steps(second, drawn, first=middle), expected[middle:], strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.needs_values
def test_every_replay_draws_anew_and_by_its_seed(config: PretrainConfig) -> None:
    """With weights that stand still, the same batch has another loss in every step, and that of an eager step."""
    config = on_gpu(config, objective=ObjectiveConfig(centering="sinkhorn_knopp"))
    still = replace(
        config, optim=replace(config.optim, base_lr=0.0, min_lr=0.0), teacher=replace(config.teacher, momentum=1.0)
    )
    batch = draw(still)[0]
    trainer, eager = graphed(still), Trainer(still)
    totals = [float(trainer.step(step, iter([batch]))["dino_local"]) for step in range(STEPS)]
    expected = [float(eager.step(step, iter([batch]))["dino_local"]) for step in range(STEPS)]
    assert len(set(totals[REPLAYED:])) == STEPS - REPLAYED
    assert totals == pytest.approx(expected, rel=1e-4)


def test_a_replay_asks_the_device_for_nothing(config: PretrainConfig) -> None:
    config = on_gpu(config)
    drawn, trainer = draw(config), graphed(config)
    list(steps(trainer, drawn, end=REPLAYED + 1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps(trainer, drawn, first=REPLAYED + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_from_replay_to_replay(config: PretrainConfig) -> None:
    config = on_gpu(config)
    drawn, trainer, held = draw(config), graphed(config), []
    for _ in steps(trainer, drawn):
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_reserved())
    assert len(set(held[REPLAYED + 2 :])) == 1


def test_probes_and_statistics_between_replays_change_nothing(config: PretrainConfig) -> None:
    config = on_gpu(config)
    drawn, trainer, other = draw(config), graphed(config), graphed(config)
    expected = list(steps(trainer, drawn))
    for step, (ours, theirs) in enumerate(zip(steps(other, drawn), expected, strict=True)):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        other.collapse_statistics(step)
        other.measure(lambda backbone: {"mean": float(backbone(torch.rand(3, 3, 24, 16, device="cuda")).mean())})
