"""Schedules of pretraining: every one is a cosine after a linear warm-up, indexed by the optimiser step.

Step ``s`` counts from 0 and names the value used *in* that step. Lengths of phases are given as fractions of the run
in the configuration, so that ``--steps`` alone stretches or compresses a whole run.
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

    The warm-up includes both its ends, as ``numpy.linspace`` does, so ``base`` is used twice: in the last step of the
    warm-up and in the first of the cosine. ``final`` is reached at ``steps``, one step past the end of the run.
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
    """What the schedules say for one step; logged under these names."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


class Schedules:
    """All schedules of a run: ``Schedules(config)(step)``.

    The learning rate follows the square-root rule, ``base_lr * sqrt(batch_size / 1024)``, with the batch of one whole
    optimiser step. The prototypes (``last_layer`` of the heads) stand still at the start of the run.
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
        """The step from which on the teacher temperature stays what it is."""
        temperature = self.temperature
        return 0 if temperature.start == temperature.base else temperature.warmup_steps


@dataclass(frozen=True, order=True)
class GroupKey:
    """Parameters with equal keys share one optimiser group.

    ``lr_scale`` and ``weight_decay_scale`` multiply the scheduled values; ``is_last_layer`` marks the prototypes,
    which follow their own learning rate at the start of a run.
    """

    lr_scale: float
    weight_decay_scale: float
    is_last_layer: bool


def layer_index(name: str, depth: int) -> int:
    """Depth of a backbone parameter: 0 for the embeddings and tokens, ``i + 1`` for block i, ``depth + 1`` above."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block.group(1)) + 1
    is_embedding = name.startswith(("patch_embed.", "pos_embed", "cls_token", "mask_token", "register_tokens"))
    return 0 if is_embedding else depth + 1


def group_key(module: str, name: str, *, depth: int, layer_decay: float, patch_embed_lr_scale: float) -> GroupKey:
    """The group of parameter ``name`` of the student's submodule ``module`` (``"backbone"`` or a head).

    Biases, norms and LayerScale gammas are not decayed. Tokens, position embeddings and ``weight_g`` are.
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
    """Optimiser groups of what learns in the student: ``params`` and the fields of their :class:`GroupKey`, in a fixed
    order."""
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
