"""Recomputed activations and compiled blocks: the same training, to the bit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from dinov2.data import batches, open_dataset
from dinov2.train import ParallelConfig, PretrainConfig
from dinov2.train.processes import Processes
from dinov2.train.sharding import gathered
from dinov2.train.trainer import Trainer
from dinov2_kernels.nn import fused_mlp
from tests.dispatches import Calls


def trained(config: PretrainConfig, processes: Processes | None) -> tuple[Trainer, dict[str, torch.Tensor]]:
    trainer = Trainer(config, processes)
    size, patch_size = config.micro_batch_size, config.vit.patch_size
    stream = batches(open_dataset(config.data), config.data, batch_size=size, patch_size=patch_size, seed=config.seed)
    for step in range(3):
        scalars = trainer.step(step, stream)
    return trainer, scalars


def assert_same_training(first: PretrainConfig, second: PretrainConfig, processes: Processes | None = None) -> None:
    (expected, losses), (actual, other_losses) = trained(first, processes), trained(second, processes)
    assert losses.keys() == other_losses.keys()
    for name, value in losses.items():
        assert torch.equal(other_losses[name], value), name
    state, other = gathered(expected.objective.state_dict()), gathered(actual.objective.state_dict())
    assert list(state) == list(other), "checkpoints do not tell"
    for name, value in state.items():
        assert torch.equal(other[name], value), name
    gradients, others = (
        gathered(dict(enumerate(p.grad for p in t.objective.parameters()))) for t in (expected, actual)
    )
    for index, gradient in gradients.items():
        assert gradient is None or torch.equal(others[index], gradient)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputed_activations_are_the_same(config: PretrainConfig, what: str, precision: str) -> None:
    """With stochastic depth, whose draws are made again, and micro-batches."""
    config = dataclasses.replace(config, precision=precision, batch_size=8, accumulation_steps=2)
    assert_same_training(config, dataclasses.replace(config, activation_checkpointing=what))


@pytest.mark.parametrize(("what", "attentions", "norms"), [("none", 0, 0), ("selective", 0, 1), ("full", 1, 1)])
def test_what_runs_twice(config: PretrainConfig, what: str, attentions: int, norms: int) -> None:
    """Each block recomputes nothing, all but products and attention, or everything."""
    trainer = Trainer(dataclasses.replace(config, activation_checkpointing=what))
    stream = batches(open_dataset(config.data), config.data, batch_size=4, patch_size=config.vit.patch_size, seed=1)
    depth = config.vit.depth
    with Calls() as calls:
        trainer.step(0, stream)
    forward = 2 * depth  # blocks of student and teacher
    assert calls.of["dinov2_kernels::attention_forward"] == forward + attentions * depth
    first, others = (calls.of[f"dinov2_kernels::residual_{norm}"] for norm in ("gather_norm", "scatter_gather_norm"))
    assert first + others == 2 * (forward + norms * depth)  # a block has two norms
    # The teacher's blocks are one chain, and the student's; a block that recomputes is one of its own, and runs twice.
    assert first == 1 + (1 if what == "none" else 2 * depth)
    assert calls.of["gelu"] >= forward + norms * depth


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Lets PyTorch's operators run what is captured: what Inductor makes of a graph is not at stake here.

    Feed-forward layers are a plain expression in a graph; without the compiler they are then one too, so that every bit
    must be the same.
    """
    monkeypatch.setattr(fused_mlp, "_can_fuse", lambda *_: False)
    compiles = nn.Module.compile
    chosen = {"backend": "aot_eager", "options": None}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiles(self, **options | chosen))
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        yield counters["stats"]


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "residual_in_fp32": False}], ids=["fp32", "bf16"])
def test_compiled_blocks_are_the_same(config: PretrainConfig, captured: Counter, changes: dict) -> None:
    """With a rate of stochastic depth, and so a graph, of its own for each block of the student."""
    config = dataclasses.replace(config, vit=dataclasses.replace(config.vit, drop_path_uniform=False), **changes)
    compiled = dataclasses.replace(config, compile=True)
    assert_same_training(config, compiled)
    assert captured["unique_graphs"] == 3
    trainer = Trainer(compiled)
    for images in range(1, 12):
        trainer.measure(lambda model, images=images: {"sum": float(model(torch.zeros(images, 3, 16, 16)).sum())})
    assert captured["unique_graphs"] == 3, "a probe compiles nothing"


def test_compiled_blocks_that_recompute_can_be_split(
    config: PretrainConfig, group: dist.ProcessGroup, captured: Counter
) -> None:
    """And blocks of one rate share a graph: the student's have one, and the teacher's."""
    config = dataclasses.replace(config, activation_checkpointing="selective", parallel=ParallelConfig(sharding="full"))
    processes = Processes(torch.device("cpu"), group=group)
    assert_same_training(config, dataclasses.replace(config, compile=True), processes)
    assert captured["unique_graphs"] == 2


def test_unknown_activation_checkpointing(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="activation_checkpointing: expected one of none, selective, full, got 'some'"):
        dataclasses.replace(config, activation_checkpointing="some")
