"""Schedules of pretraining: each one is a linear warm-up and then a cosine, indexed by the optimiser step.

Steps count from 0, and a schedule gives the value used *in* a step. The configuration gives the lengths of phases as
fractions of the run, so ``--steps`` alone stretches or shortens a whole run.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dinov2.train.config import RunConfig


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from ``start`` to ``base``, then half a cosine from ``base`` towards ``final``.

    The warm-up includes both its ends, as ``numpy.linspace`` does. So ``base`` is used twice: in the last step of the
    warm-up and in the first step of the cosine. The schedule reaches ``final`` at ``steps``, one step after the run.
    """

    base: float
    final: float
    steps: int
    warmup_steps: int = 0
    start: float = 0.0

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.final
        if step < self.warmup_steps:
            return self.start + (self.base - self.start) * step / max(1, self.warmup_steps - 1)
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepSettings:
    """The scheduled values of one step. They are logged under these names."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


class Schedules:
    """All schedules of a run: ``Schedules(config)(step)``.

    The learning rate follows the square-root rule, ``base_lr * sqrt(batch_size / 1024)``, for the batch of an optimiser
    step. The prototypes (``last_layer`` of the heads) are frozen at the start of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        steps, optim, teacher = config.steps, config.optim, config.teacher
        peak_lr = optim.base_lr * math.sqrt(config.batch_size / 1024)
        self.lr = CosineSchedule(peak_lr, optim.min_lr, steps, round(optim.warmup_fraction * steps))
        self.weight_decay = CosineSchedule(optim.weight_decay, optim.weight_decay_end, steps)
        self.momentum = CosineSchedule(teacher.momentum, teacher.momentum_end, steps)
        self.temperature = CosineSchedule(
            teacher.temperature,
            teacher.temperature,
            steps,
            round(teacher.temperature_warmup_fraction * steps),
            start=teacher.temperature_start,
        )
        self.frozen_steps = round(optim.freeze_last_layer_fraction * steps)

    def __call__(self, step: int) -> StepSettings:
        lr = self.lr(step)
        return StepSettings(
            lr=lr,
            last_layer_lr=0.0 if step < self.frozen_steps else lr,
            weight_decay=self.weight_decay(step),
            teacher_momentum=self.momentum(step),
            teacher_temperature=self.temperature(step),
        )

    @property
    def first_resting_step(self) -> int:
        """The first step from which on the teacher temperature is constant."""
        temperature = self.temperature
        return 0 if temperature.start == temperature.base else temperature.warmup_steps


@dataclass(frozen=True, order=True)
class GroupKey:
    """Parameters with equal keys share one optimiser group.

    ``lr_scale`` and ``weight_decay_scale`` multiply the scheduled values. ``is_last_layer`` marks the prototypes, which
    have a learning rate of their own at the start of a run.
    """

    lr_scale: float
    weight_decay_scale: float
    is_last_layer: bool


def layer_index(name: str, depth: int) -> int:
    """Depth of a backbone parameter: 0 for embeddings and tokens, ``i + 1`` for block i, ``depth + 1`` after them."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block.group(1)) + 1
    is_embedding = name.startswith(("patch_embed.", "pos_embed", "cls_token", "mask_token", "register_tokens"))
    return 0 if is_embedding else depth + 1


def group_key(module: str, name: str, *, depth: int, layer_decay: float, patch_embed_lr_scale: float) -> GroupKey:
    """The group of parameter ``name`` of the student's submodule ``module`` (``"backbone"`` or a head).

    Tokens, position embeddings and ``weight_g`` have weight decay. Biases, norms and LayerScale gammas have none.
    """
    lr_scale = 1.0
    if module == "backbone":
        lr_scale = layer_decay ** (depth + 1 - layer_index(name, depth))
        if name.startswith("patch_embed."):
            lr_scale *= patch_embed_lr_scale
    undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
    return GroupKey(lr_scale, 0.0 if undecayed else 1.0, is_last_layer="last_layer" in name)


def parameter_groups(
    student: nn.ModuleDict, *, layer_decay: float, patch_embed_lr_scale: float
) -> list[dict[str, Any]]:
    """Optimiser groups of the student's trainable parameters, in a fixed order.

    Each group has ``params`` and the fields of their :class:`GroupKey`.
    """
    depth = len(student["backbone"].blocks)  # type: ignore[arg-type]
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    for module, submodule in student.items():
        for name, parameter in submodule.named_parameters():
            if not parameter.requires_grad:
                continue
            key = group_key(
                module, name, depth=depth, layer_decay=layer_decay, patch_embed_lr_scale=patch_embed_lr_scale
            )
            groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], **asdict(key)} for key in sorted(groups)]


def apply_settings(groups: list[dict[str, Any]], settings: StepSettings) -> None:
    """Write the learning rate and weight decay of one step into the optimiser's groups."""
    for group in groups:
        lr = settings.last_layer_lr if group["is_last_layer"] else settings.lr
        group["lr"] = group["lr_scale"] * lr
        group["weight_decay"] = group["weight_decay_scale"] * settings.weight_decay
