"""A run small enough to repeat many times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

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


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
