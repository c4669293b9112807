"""The student and the EMA teacher of self-distillation: module dictionaries of a backbone and its heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models import DINOHead, HeadConfig, VisionTransformer, ViTConfig
from dinov2.models.dino_head import WeightNormLinear


def build_networks(
    vit: ViTConfig, dino_head: HeadConfig, ibot_head: HeadConfig | None = None
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Student and EMA teacher with the same initial weights, for :class:`SelfDistillation`.

    The teacher has no stochastic depth, and its parameters require no gradient.

    Args:
        vit: architecture of both backbones.
        dino_head: head of the class tokens.
        ibot_head: head of the masked patches; None shares the DINO head.

    Returns:
        (student, teacher), each with the modules backbone, dino_head and, if separate, ibot_head.
    """
    student = build_network(vit, dino_head, ibot_head)
    teacher = build_network(replace(vit, drop_path_rate=0.0), dino_head, ibot_head)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def build_network(vit: ViTConfig, dino_head: HeadConfig, ibot_head: HeadConfig | None = None) -> nn.ModuleDict:
    """One network, with the modules backbone, dino_head and, if separate, ibot_head; see :func:`build_networks`."""
    modules: dict[str, nn.Module] = {
        "backbone": VisionTransformer(vit),
        "dino_head": DINOHead(vit.embed_dim, **asdict(dino_head)),
    }
    if ibot_head is not None:
        modules["ibot_head"] = DINOHead(vit.embed_dim, **asdict(ibot_head))
    return nn.ModuleDict(modules)


def check_networks(student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
    """Raise ValueError unless both have a backbone and the same heads with the same numbers of prototypes."""
    for role, network in (("student", student), ("teacher", teacher)):
        for name in ("backbone", "dino_head"):
            if name not in network:
                raise ValueError(f"{role}: expected modules backbone and dino_head, got {', '.join(network) or 'none'}")
    if student.keys() != teacher.keys():
        raise ValueError(f"teacher: expected the student's modules {', '.join(student)}, got {', '.join(teacher)}")
    for name in (name for name in student if name != "backbone"):
        expected, got = num_prototypes(student[name]), num_prototypes(teacher[name])
        if got != expected:
            raise ValueError(f"teacher: expected the student's {expected} prototypes in {name}, got {got}")


def check_same_parameters(student: nn.ModuleDict, teacher: nn.ModuleDict) -> None:
    """Raise ValueError unless both have parameters of the same names and shapes."""
    student_shapes, teacher_shapes = (
        {(name, tuple(p.shape)) for name, p in network.named_parameters()} for network in (student, teacher)
    )
    if student_shapes != teacher_shapes:
        name, shape = min(student_shapes ^ teacher_shapes)
        raise ValueError(f"teacher: expected the student's parameters, got {name} {list(shape)} in only one of them")


def features(
    network: nn.ModuleDict, crops: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> list[dict[str, Tensor]]:
    """Backbone outputs of each group of crops [N_i, 3, H_i, W_i]."""
    return cast(Any, network["backbone"]).forward_features(list(crops), masks=list(masks))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Projected:
    """Features of tokens from their head, before its prototypes.

    Attributes:
        features: [N, d], normalised.
        prototypes: the last layer of the head.
    """

    features: Tensor
    prototypes: WeightNormLinear


def project(network: nn.ModuleDict, class_tokens: Tensor, patch_tokens: Tensor) -> tuple[Projected, Projected]:
    """Apply the heads to class tokens [N, D] and patch tokens [M, D]; a shared head runs once for both."""
    class_head = cast(DINOHead, network["dino_head"])
    if "ibot_head" in network:
        patch_head = cast(DINOHead, network["ibot_head"])
        class_features, patch_features = class_head.features(class_tokens), patch_head.features(patch_tokens)
    else:
        patch_head = class_head
        both = class_head.features(torch.cat([class_tokens, patch_tokens]))  # [N + M, d]
        class_features, patch_features = both.split([len(class_tokens), len(patch_tokens)])
    return Projected(class_features, class_head.last_layer), Projected(patch_features, patch_head.last_layer)


def logits_of(class_tokens: Projected, patch_tokens: Projected) -> tuple[Tensor, Tensor]:
    """Logits of both, [N, K] and [M, K'], as separate tensors: slices of one tensor would have full-size gradients."""
    layer = class_tokens.prototypes
    if patch_tokens.prototypes is not layer:
        return layer(class_tokens.features), patch_tokens.prototypes(patch_tokens.features)
    weight = layer.weight()  # [K, d], normalised once for both
    return F.linear(class_tokens.features, weight), F.linear(patch_tokens.features, weight)


def num_prototypes(head: nn.Module) -> int:
    """The number K of prototypes of a DINOHead."""
    return len(cast(DINOHead, head).last_layer.weight_v)
