"""A tiny ViT on patches of the bundled photographs: minutes on two CPU cores, no download."""

from __future__ import annotations

from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.train.config import OptimConfig, PretrainConfig, TeacherConfig


def photos() -> PretrainConfig:
    """A tiny ViT on the bundled photographs; runs on a laptop, no download.

    Made for images of 128 pixels: a crop takes about as many pixels of one as it has itself, so it keeps their scale,
    and two crops show two places of one neighbourhood. It differs from the reference because there are minutes and
    thousands of images, not days and millions: small patches, since fine texture is what tells these images apart;
    small batches, for many steps; few prototypes with sharp, balanced targets; a learning rate of 0.001 everywhere, and
    no slow start by LayerScale; colours that are only just disturbed, since they carry meaning here.
    """
    return PretrainConfig(
        output=Path("runs/photos"),
        steps=3000,
        batch_size=16,
        vit=ViTConfig(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=1, init_values=1.0),
        dino_head=HeadConfig(out_dim=64, hidden_dim=256, bottleneck_dim=64),
        objective=ObjectiveConfig(centering="sinkhorn_knopp"),
        data=DataConfig(
            num_workers=1,
            augmentation=AugmentationConfig(
                global_size=32,
                local_size=16,
                local_crops=4,
                global_scale=(0.04, 0.125),
                local_scale=(0.01, 0.03),
                brightness=0.2,
                contrast=0.2,
                saturation=0.1,
                hue=0.02,
                grayscale=0.0,
                blur_sigma=(0.1, 0.5),
                solarize=0.0,
            ),
        ),
        optim=OptimConfig(
            base_lr=8e-3,  # 1e-3 for 16 images
            weight_decay_end=0.2,
            layer_decay=1.0,
            patch_embed_lr_scale=1.0,
            freeze_last_layer_fraction=0.03,
        ),
        teacher=TeacherConfig(momentum=0.98, temperature=0.04),
        log_every=10,
        probe_every=200,
        checkpoint_every=500,
    )
