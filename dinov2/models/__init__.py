"""The vision transformers of DINOv2, their projection heads, and files of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2.lazily import names_from
from dinov2.models.config import HeadConfig, ViTConfig

if TYPE_CHECKING:
    from dinov2.models.checkpoints.weights import Weights, load_pretrained, read_weights
    from dinov2.models.checkpoints.writing import save_heads, save_pretrained
    from dinov2.models.dino_head import DINOHead
    from dinov2.models.vision_transformer import VisionTransformer, vit_base, vit_giant2, vit_large, vit_small
else:
    __getattr__ = names_from(
        __name__,
        {
            "checkpoints.weights": ("Weights", "load_pretrained", "read_weights"),
            "checkpoints.writing": ("save_heads", "save_pretrained"),
            "dino_head": ("DINOHead",),
            "vision_transformer": ("VisionTransformer", "vit_base", "vit_giant2", "vit_large", "vit_small"),
        },
    )

__all__ = [
    "DINOHead",
    "HeadConfig",
    "ViTConfig",
    "VisionTransformer",
    "Weights",
    "load_pretrained",
    "read_weights",
    "save_heads",
    "save_pretrained",
    "vit_base",
    "vit_giant2",
    "vit_large",
    "vit_small",
]
