"""A run small enough to repeat many times."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.train import OptimConfig, PretrainConfig


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """8 steps of 4 bundled photographs by two blocks; stochastic depth, masks and every augmentation are on."""
    return PretrainConfig(
        output=tmp_path / "run",
        steps=8,
        batch_size=4,
        vit=ViTConfig(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.3),
        dino_head=HeadConfig(out_dim=64, hidden_dim=32, bottleneck_dim=16),
        data=DataConfig(num_workers=0, augmentation=AugmentationConfig(global_size=16, local_size=8, local_crops=2)),
        optim=OptimConfig(freeze_last_layer_fraction=0.25),
        device="cpu",
        log_every=1,
        checkpoint_every=3,
        seed=5,
    )
