"""The vision transformers of DINOv2, their projection heads, and files of weights."""

from dinov2.models.checkpoints.weights import Weights, load_pretrained, read_weights
from dinov2.models.checkpoints.writing import save_heads, save_pretrained
from dinov2.models.config import ViTConfig
from dinov2.models.dino_head import DINOHead, HeadConfig
from dinov2.models.vision_transformer import VisionTransformer, vit_base, vit_giant2, vit_large, vit_small

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
