"""Where a run starts, if not from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from dinov2.models import HeadConfig, VisionTransformer, Weights
from dinov2.objectives import SelfDistillation
from dinov2.train.config import RunConfig
from dinov2.train.networks import CENTERS, read_networks


def start_from_initial_weights(objective: SelfDistillation, config: RunConfig) -> str | None:
    """Give a new run the weights that ``config.initial_weights`` names; without a name do nothing.

    A run's checkpoint gives student, moving average, heads and centres as they were; of any other source both networks
    take the same weights. Position embeddings are resampled to the run's image size. A head that the source lacks, or
    has with other sizes, starts anew, as does its centre.

    Returns:
        In words, where the weights are from and what started anew.

    Raises:
        FileNotFoundError, ValueError: there is nothing, it cannot be read, or the backbone is of another architecture.
    """
    if config.initial_weights is None:
        return None
    wanted = {"dino_head": config.dino_head} | ({"ibot_head": config.ibot_head} if config.ibot_head else {})
    notes: dict[str, None] = {}  # a set in the order of insertion
    for name, student in objective.students.items():
        networks = read_networks(config.initial_weights, student=name or None)
        notes |= {f"from {networks.teacher.origin}": None}
        fitting = {head: difference(networks.teacher, head, expected) for head, expected in wanted.items()}
        notes |= {f"{name} {head} starts anew ({reason})".lstrip(): None for head, reason in fitting.items() if reason}
        heads = [head for head, reason in fitting.items() if not reason]
        load_whole(student, _tensors(student, networks.student, heads))
        load_whole(objective.averages[name], _tensors(student, networks.teacher, heads))
        load_centers(objective, networks.teacher, heads)
    return "; ".join(notes)


def difference(weights: Weights, head: str, wanted: HeadConfig) -> str | None:
    """Why a head cannot be taken over, in words; None if it can."""
    if head not in weights.heads:
        return "the weights come without it"
    there, here = asdict(weights.head_config(head)), asdict(wanted)
    differing = [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    return ", ".join(differing) or None


def load_whole(network: nn.ModuleDict, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a network, which may be split among processes; it keeps what is not among them."""
    if unknown := tensors.keys() - network.state_dict().keys():
        raise ValueError(f"the weights have tensors that the model lacks: {', '.join(sorted(unknown)[:5])}")
    set_model_state_dict(network, dict(tensors), options=StateDictOptions(full_state_dict=True, strict=False))


def _tensors(student: nn.ModuleDict, weights: Weights, heads: list[str]) -> dict[str, Tensor]:
    """Tensors by their names in a network: the backbone at its image size, and these heads."""
    vit = cast(VisionTransformer, student["backbone"]).config
    parts = {"backbone": weights.backbone_for(vit)} | {head: weights.heads[head] for head in heads}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@torch.no_grad()
def load_centers(objective: SelfDistillation, weights: Weights, heads: list[str]) -> None:
    """Continue the centres that belong to these heads, where the objective and the weights have any."""
    own = dict(objective.named_buffers())
    patch_head = "ibot_head" if "ibot_head" in objective.teacher else "dino_head"
    for name, head in {"dino_centering.center": "dino_head", "ibot_centering.center": patch_head}.items():
        center = weights.centers.get(CENTERS[name])
        if name in own and head in heads and center is not None:
            own[name].copy_(center.flatten())
