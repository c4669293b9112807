"""A small ViT on the bundled photographs: minutes on two CPU cores, no download."""

from __future__ import annotations

from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.train.config import OptimConfig, PretrainConfig, TeacherConfig


def photos() -> PretrainConfig:
    """A small ViT on the bundled photographs; runs on a laptop, no download."""
    return PretrainConfig(
        output=Path("runs/photos"),
        steps=600,
        batch_size=64,
        vit=ViTConfig(img_size=32, patch_size=8, embed_dim=128, depth=4, num_heads=2),
        dino_head=HeadConfig(out_dim=1024, hidden_dim=256, bottleneck_dim=64),
        objective=ObjectiveConfig(),
        data=DataConfig(
            augmentation=AugmentationConfig(global_size=32, local_size=16, local_crops=4),
        ),
        optim=OptimConfig(base_lr=4e-3, warmup_fraction=0.1, layer_decay=1.0),
        teacher=TeacherConfig(),
        log_every=10,
        probe_every=100,
        checkpoint_every=100,
    )
