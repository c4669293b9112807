"""Short runs whose steps can be replayed, for tests on the CPU and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.data import MaskConfig, batches, finishes_crops
from dinov2.models.checkpoints.run import RunCheckpoint
from dinov2.train import PretrainConfig, TeacherConfig
from dinov2.train.graphed_step import WARM_UP
from dinov2.train.saving import CheckpointDirectory, CheckpointSaver
from dinov2.train.trainer import Trainer

STEPS = 10
RESTING = 1
"""The first step with the last teacher temperature."""
REPLAYED = RESTING + WARM_UP
"""The first step that is replayed."""


def with_static_shapes(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    """``config`` for STEPS steps without changing shapes; prototypes stand still until some steps were replayed.

    LayerScale starts at 1, so that every weight counts.
    """
    augmentation = replace(config.data.augmentation, global_size=32)
    return replace(
        config,
        steps=STEPS,
        vit=replace(config.vit, img_size=32, init_values=1.0),
        data=replace(config.data, augmentation=augmentation, masks=MaskConfig(same_total=True)),
        optim=replace(config.optim, freeze_last_layer_fraction=(REPLAYED + 2) / STEPS),
        teacher=TeacherConfig(temperature_warmup_fraction=RESTING / STEPS),
        **changes,
    )


class Waves:
    """Images of coloured waves, each of another length and direction; they need no package."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> np.ndarray:
        frequency, phase = np.random.default_rng(index).uniform(0, 0.5, (2, 3, 1, 1))
        y, x = np.mgrid[:64, :64]
        waves = np.sin(frequency * x + phase * y + 9 * phase)  # [3, 64, 64]
        return np.ascontiguousarray((127.5 + 127.5 * waves).astype(np.uint8).transpose(1, 2, 0))


def draw(config: PretrainConfig) -> list[dict[str, Tensor]]:
    """All micro-batches of the run, of waves."""
    stream = batches(
        Waves(),
        config.data,
        batch_size=config.micro_batch_size,
        patch_size=config.patch_size,
        seed=config.seed,
        raw=finishes_crops(torch.device(config.device)),
    )
    return list(itertools.islice(stream, STEPS * config.accumulation_steps))


def in_float64(drawn: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same images, for networks in float64."""
    return [{name: x.double() if x.is_floating_point() else x for name, x in batch.items()} for batch in drawn]


def steps(
    trainer: Trainer, drawn: list[dict[str, Tensor]], first: int = 0, end: int = STEPS
) -> Iterator[dict[str, Tensor]]:
    """Carry out steps ``first`` to ``end - 1``, and yield the scalars of each."""
    stream = iter(drawn[first * trainer.config.accumulation_steps :])
    for step in range(first, end):
        yield trainer.step(step, stream)


def flat_state(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the state by its full name."""

    def flat(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, value in tree.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]

    return dict(flat(trainer.state_dict(), ""))


def copied_state(trainer: Trainer) -> dict[str, Tensor]:
    """As :func:`flat_state`, and further steps do not change it."""
    return {name: tensor.detach().clone() for name, tensor in flat_state(trainer).items()}


def resume(trainer: Trainer, other: Trainer, step: int, directory: Path) -> None:
    """Let ``other`` go on where ``trainer`` is, by way of a checkpoint."""
    checkpoints = CheckpointDirectory(directory, keep=1)
    with CheckpointSaver(checkpoints, trainer.processes) as saver:
        saver.save(step, trainer.state_dict(), {})
    other.restore(RunCheckpoint(checkpoints.path(step)))


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    """All tensors under the same names, within a tolerance; without one, bit by bit."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
