"""Copies of the weights in low precision: training is what autocast makes of it, to the bit, with fewer casts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.data import Batch, batches, open_dataset
from dinov2.models import HeadConfig
from dinov2.models.checkpoints.run import RunCheckpoint
from dinov2.objectives import ObjectiveConfig
from dinov2.recipes import distillation
from dinov2.train import ParallelConfig, PretrainConfig, RunConfig, pretrain, trainer
from dinov2.train.networks import checkpoint_of, start_from_initial_weights
from dinov2.train.precision import WeightCopies, keeps_weight_copies
from dinov2.train.processes import Processes
from dinov2.train.trainer import Trainer
from tests.dispatches import Calls
from tests.train.test_precision import flat

LOSS_SCALE = 2.0**7  # float16 overflows with it in some of the first steps, and not in all


@pytest.fixture
def config(config: PretrainConfig) -> PretrainConfig:
    """In bfloat16; LayerScale starts at 1, so that every weight counts from the first step on."""
    return replace(config, precision="bf16", vit=replace(config.vit, init_values=1.0))


@contextmanager
def keeping_copies(kept: bool) -> Iterator[None]:
    """Trainers made in here keep copies of weights, or none, whatever device they have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "keeps_weight_copies", lambda *args, **options: kept)
        yield


def trainers(config: RunConfig, processes: Processes | None = None) -> tuple[Trainer, Trainer]:
    """The same run without copies and with them, as on a GPU."""
    with keeping_copies(False):
        plain = Trainer(config, processes)
    with keeping_copies(True):
        copying = Trainer(config, processes)
    assert not plain._weight_copies.tensors
    assert copying._weight_copies.tensors
    for made in (plain, copying):
        if made.arithmetic.scaler is not None:
            made.arithmetic.load_state_dict(made.arithmetic.state_dict() | {"scale": LOSS_SCALE})
    return plain, copying


def stream_of(config: RunConfig, first: int = 0) -> Iterator[Batch]:
    """The micro-batches of a run from a step on."""
    return batches(
        open_dataset(config.data),
        config.data,
        batch_size=config.micro_batch_size,
        patch_size=config.patch_size,
        seed=config.seed,
        start_step=first * config.accumulation_steps,
    )


def assert_same_steps(plain: Trainer, copying: Trainer, first: int = 0, last: int = 5) -> list[dict[str, Tensor]]:
    """Both take the steps from first to last; losses, statistics of targets and all state are equal afterwards."""
    steps, streams = [], [stream_of(plain.config, first) for _ in range(2)]
    for step in range(first, last):
        expected, actual = (made.step(step, stream) for made, stream in zip((plain, copying), streams, strict=True))
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value) or (value.isnan() and actual[name].isnan()), f"{name}, step {step}"
        assert plain.collapse_statistics(step) == copying.collapse_statistics(step)
        steps.append(expected)
    state, other = flat(plain.state_dict()), flat(copying.state_dict())
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(other[name], value), name
    return steps


HEAD = HeadConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ibot_head": HEAD, "batch_size": 8, "accumulation_steps": 2},
        {"objective": ObjectiveConfig(centering="sinkhorn_knopp", student_logits="recomputed")},
        {"activation_checkpointing": "selective"},
        {"activation_checkpointing": "full"},
        {"precision": "fp16"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_training_is_the_same(config: PretrainConfig, changes: dict[str, Any]) -> None:
    steps = assert_same_steps(*trainers(replace(config, **changes)))
    if "precision" in changes:
        assert {float(step["skipped"]) for step in steps} == {0.0, 1.0}


def test_training_with_swiglu_is_the_same(config: PretrainConfig) -> None:
    vit = replace(config.vit, ffn="swiglu", qkv_bias=False, num_register_tokens=2)
    assert_same_steps(*trainers(replace(config, vit=vit)))


def test_training_of_several_processes_is_the_same(config: PretrainConfig, group: dist.ProcessGroup) -> None:
    config = replace(config, batch_size=8, accumulation_steps=2)
    assert_same_steps(*trainers(config, Processes(torch.device("cpu"), group=group)))


def test_distillation_is_the_same(config: PretrainConfig) -> None:
    """Two students learn from a frozen teacher, first with random weights, then from other weights."""
    teacher = pretrain(replace(config, steps=1, vit=replace(config.vit, embed_dim=48)))
    published = distillation(teacher, ["vit_small"])
    students = {
        name: replace(config.vit, embed_dim=width, drop_path_rate=0.0) for name, width in (("a", 16), ("b", 32))
    }
    distilled = replace(
        published,
        output=config.output.with_name("distilled"),
        students=students,
        steps=8,
        batch_size=4,
        accumulation_steps=1,
        device="cpu",
    )
    plain, copying = trainers(distilled)
    assert_same_steps(plain, copying, last=3)
    for made in (plain, copying):  # weights that change behind the copies' back
        with torch.no_grad():
            for parameter in made.objective.teacher.parameters():
                parameter.mul_(1.25)
    assert_same_steps(plain, copying, first=3, last=5)


def test_the_copies_follow_weights_that_are_read(config: PretrainConfig) -> None:
    """A checkpoint, and initial weights, read after some steps of training."""
    checkpoint = checkpoint_of(pretrain(replace(config, steps=2, seed=9)))
    plain, copying = trainers(config)
    assert_same_steps(plain, copying, last=2)
    for made in (plain, copying):
        made.restore(RunCheckpoint(checkpoint))
    assert_same_steps(plain, copying, first=2, last=4)
    for made in (plain, copying):
        start_from_initial_weights(made.objective, replace(config, initial_weights=checkpoint))
    assert_same_steps(plain, copying, first=4, last=6)


def test_a_step_casts_no_weight_of_a_linear_layer(config: PretrainConfig) -> None:
    """One call casts all weights; for each block, and for the head, one call casts their gradients."""
    counts = []
    for made in trainers(config):
        stream = stream_of(config)
        made.step(0, stream)
        with Calls() as calls:
            made.step(1, stream)
        counts.append(calls.of)
    plain, copying = counts
    depth, weights = config.vit.depth, 8 * config.vit.depth + 2 * 3  # and biases, of blocks and of a head
    # Teacher, student and gradients are cast; feed-forward layers cast both weights once more, in the backward pass.
    assert plain["_to_copy"] - copying["_to_copy"] == 3 * weights + 2 * depth
    assert copying["_foreach_copy_"] == 1 + depth + 1


def test_modules_hold_their_weights_again_afterwards(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _, copying = trainers(config)
    before = dict(copying.objective.named_parameters())
    assert before
    stream = stream_of(config)
    copying.step(0, stream)
    seen: list[torch.dtype] = []

    def fails(loss: Tensor) -> None:
        seen.append(copying.objective.student["dino_head"].mlp[0].weight.dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(copying.arithmetic, "backward", fails)
    with pytest.raises(KeyboardInterrupt):
        copying.step(1, stream)
    assert seen == [torch.bfloat16]
    after = dict(copying.objective.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        assert after[name] is parameter
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


def test_a_forward_pass_before_renewal_cannot_be_followed_back() -> None:
    """Its backward pass would take weights that it did not use: PyTorch sees that, and says so."""
    network = nn.ModuleDict({"head": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    copies = WeightCopies([network], torch.bfloat16)
    with copies.in_place(), torch.autocast("cpu", torch.bfloat16):
        y = network["head"](torch.ones(5, 3))
    copies.renew()
    with pytest.raises(RuntimeError, match="has been modified inplace"):
        y.sum().backward()


def test_weights_without_a_gradient(config: PretrainConfig) -> None:
    """A weight that is not trained, and a layer that a pass leaves out, are as without copies."""
    layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 3)])
    layers[0].bias.requires_grad_(False)
    copies = WeightCopies([nn.ModuleDict({"head": layers})], torch.bfloat16)
    gradients = []
    for context in (copies.in_place, lambda: torch.autocast("cpu", torch.bfloat16)):
        with context(), torch.autocast("cpu", torch.bfloat16):
            layers[1](layers[0](torch.ones(5, 3))).sum().backward()
        gradients.append([parameter.grad for parameter in layers.parameters()])
        layers.zero_grad()
    assert [grad is None for grad in gradients[0]] == [False, True, False, False, True, True]
    for first, second in zip(*gradients, strict=True):
        assert (first is None) if second is None else torch.equal(first, second)


def test_where_there_are_copies(config: PretrainConfig) -> None:
    """Not on a CPU, in float32, in compiled blocks, or in networks that FSDP splits and casts."""
    on_gpu = replace(config, precision="auto")
    assert keeps_weight_copies(on_gpu, "cuda", is_split=False)
    assert keeps_weight_copies(config, "cuda", is_split=False)
    assert not keeps_weight_copies(config, "cpu", is_split=False)
    assert not keeps_weight_copies(replace(config, precision="fp32"), "cuda", is_split=False)
    assert not keeps_weight_copies(replace(on_gpu, compile=True), "cuda", is_split=False)
    assert not keeps_weight_copies(on_gpu, "cuda", is_split=True)
    assert not Trainer(config)._weight_copies.tensors


def test_a_trainer_says_what_it_is(
    config: PretrainConfig, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device, and whether its networks are split: where these forbid copies it has none."""
    asked: list[tuple[str, bool]] = []

    def answer(config: RunConfig, device_type: str, *, is_split: bool) -> bool:
        asked.append((device_type, is_split))
        return not is_split

    monkeypatch.setattr(trainer, "keeps_weight_copies", answer)
    processes = Processes(torch.device("cpu"), group=group)
    split = replace(config, parallel=ParallelConfig(sharding="full"))
    assert not Trainer(split, processes)._weight_copies.tensors
    assert Trainer(config, processes)._weight_copies.tensors
    assert asked == [("cpu", True), ("cpu", False)]
