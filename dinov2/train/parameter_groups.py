"""Parameter groups: layerwise learning-rate decay, the slower patch embedding, and what is not decayed."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dinov2.train.schedules import StepSettings


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
