"""A training step never asks the device for a value, so a GPU is never waited for; nor need its shapes change."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2.data import MaskConfig, batches, open_dataset
from dinov2.objectives import ObjectiveConfig
from dinov2.train import PretrainConfig
from dinov2.train.processes import Processes
from dinov2.train.trainer import Trainer


def micro_batches(config: PretrainConfig):
    size, patch_size = config.micro_batch_size, config.vit.patch_size
    return batches(open_dataset(config.data), config.data, batch_size=size, patch_size=patch_size, seed=config.seed)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": ObjectiveConfig(centering="sinkhorn_knopp"), "accumulation_steps": 2, "batch_size": 8},
        {"objective": ObjectiveConfig(student_logits="recomputed"), "activation_checkpointing": "selective"},
    ],
    ids=["softmax", "sinkhorn, accumulated", "recomputed"],
)
def test_a_step_runs_where_there_are_no_values(
    config: PretrainConfig, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, whose tensors have a shape and nothing in it: reading one is an error there.

    Masks are on the host, as in every run: there the number of masked patches may be asked for.
    """
    optimizer = sys.modules["torch.optim.optimizer"]  # torch.optim hides the module behind a name of its own
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    config = dataclasses.replace(config, **changes)
    trainer, stream = Trainer(config, Processes(torch.device("meta"))), micro_batches(config)
    for step in range(2):
        scalars = trainer.step(step, stream)
    assert {"total", "ibot", "grad_norm/backbone"} <= scalars.keys()
    assert all(value.is_meta for value in scalars.values())


class Reads(TorchDispatchMode):
    """Collects where a value was read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.places.append("".join(traceback.format_stack(limit=12)))
        return function(*args, **(kwargs or {}))

    def check(self) -> None:
        """On the CPU, the cross-entropy checks its row numbers; nothing else may read."""
        assert self.places
        assert not [place for place in self.places if "dinov2_kernels/cross_entropy/" not in place]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_of_low_precision_reads_no_value(config: PretrainConfig, precision: str) -> None:
    """The meta device knows no autocast, so this is the CPU's."""
    trainer, stream = Trainer(dataclasses.replace(config, precision=precision)), micro_batches(config)
    trainer.step(0, stream)
    with Reads() as reads:
        trainer.step(1, stream)
    reads.check()


def test_reads_are_seen() -> None:
    with Reads() as reads:
        torch.ones(1).item()
    with pytest.raises(AssertionError):
        reads.check()


class Shapes(TorchDispatchMode):
    """Collects every operator with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.calls.append((function, [x.shape for x in tensors]))
        return result


def test_with_masks_of_the_same_total_no_shape_changes(config: PretrainConfig) -> None:
    """So graphs, compiled or of CUDA, stay valid from step to step."""
    augmentation = dataclasses.replace(config.data.augmentation, global_size=64)
    data = dataclasses.replace(config.data, augmentation=augmentation)
    for masks, are_fixed in ((MaskConfig(same_total=True), True), (MaskConfig(), False)):
        fixed = dataclasses.replace(config, data=dataclasses.replace(data, masks=masks))
        trainer, drawn = Trainer(fixed), list(itertools.islice(micro_batches(fixed), 4))
        trainer.step(0, iter(drawn))
        seen = set()
        for step in range(1, 4):
            with Shapes() as shapes:
                trainer.step(step, iter(drawn[step:]))
            seen.add(str(shapes.calls))
        assert (len(seen) == 1) == are_fixed
