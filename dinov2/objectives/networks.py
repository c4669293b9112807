"""The student and the teacher of self-distillation."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import nn

from dinov2.models import DINOHead, HeadConfig, VisionTransformer, ViTConfig


def build_networks(
    vit: ViTConfig, dino_head: HeadConfig, ibot_head: HeadConfig | None = None
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Student and teacher with the same initial weights: what :class:`SelfDistillation` trains.

    The teacher has no stochastic depth and its parameters require no gradient.

    Args:
        vit: backbone of both.
        dino_head: head of the class tokens.
        ibot_head: head of the masked patches; None shares the DINO head.

    Returns:
        (student, teacher), each with the modules backbone, dino_head and, if separate, ibot_head.
    """
    student = _network(vit, dino_head, ibot_head)
    teacher = _network(replace(vit, drop_path_rate=0.0), dino_head, ibot_head)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)


def _network(vit: ViTConfig, dino_head: HeadConfig, ibot_head: HeadConfig | None) -> nn.ModuleDict:
    modules: dict[str, nn.Module] = {
        "backbone": VisionTransformer(vit),
        "dino_head": DINOHead(vit.embed_dim, **asdict(dino_head)),
    }
    if ibot_head is not None:
        modules["ibot_head"] = DINOHead(vit.embed_dim, **asdict(ibot_head))
    return nn.ModuleDict(modules)
