"""The configurations of the paper's public code: ImageNet-1k in a day, ImageNet-22k ViT-L and ViT-g.

They are the published tables with two differences. Position embeddings are interpolated with antialiasing and no
offset, as in the models with registers: such weights mean the same in Hugging Face and timm. And "epochs", there 1250
steps whatever the data, are steps here.

``accumulation_steps`` splits the global batch into the micro-batches that one GPU of the published runs held, so that
KoLeo compares as many images as it did there. On one GPU each step then takes as long as it sounds. The processes of
``torchrun`` share a micro-batch: with N of them, divide ``accumulation_steps`` by N.
"""

from __future__ import annotations

from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.train.config import OptimConfig, PretrainConfig, TeacherConfig

IMAGES = Path("images")
"""Where the recipes look unless ``--data.root`` says otherwise."""


def vitl16_short() -> PretrainConfig:
    """ViT-L/16 on ImageNet-1k: 125,000 steps of 2048 images (81.6 % k-NN published)."""
    return PretrainConfig(
        output=Path("runs/vitl16_short"),
        steps=125_000,
        batch_size=2048,
        accumulation_steps=32,
        precision="bf16",
        vit=ViTConfig.of("vit_large", patch_size=16, drop_path_rate=0.3),
        dino_head=HeadConfig(out_dim=65536, hidden_dim=2048, bottleneck_dim=256, num_layers=3),
        ibot_head=None,
        objective=ObjectiveConfig(centering="softmax"),
        data=DataConfig(root=IMAGES, augmentation=AugmentationConfig(local_size=96)),
        optim=OptimConfig(base_lr=4e-3, warmup_fraction=0.1, weight_decay_end=0.4, layer_decay=0.9),
        teacher=TeacherConfig(momentum=0.992, temperature_warmup_fraction=0.3),
        log_every=50,
        probe_every=12_500,
        checkpoint_every=1250,
    )


def vitl14() -> PretrainConfig:
    """ViT-L/14 on ImageNet-22k: 625,000 steps of 3072 images (82.0 % k-NN published)."""
    return _imagenet22k(
        Path("runs/vitl14"),
        ViTConfig.of("vit_large", patch_size=14, ffn="swiglu", drop_path_rate=0.4),
        accumulation_steps=96,
    )


def vitg14() -> PretrainConfig:
    """ViT-g/14, the largest DINOv2: 625,000 steps of 3072 images (83.5 % k-NN published, on LVD-142M)."""
    return _imagenet22k(
        Path("runs/vitg14"),
        ViTConfig.of("vit_giant2", patch_size=14, drop_path_rate=0.4),
        accumulation_steps=256,
    )


def vitb14() -> PretrainConfig:
    """ViT-B/14 from scratch, by the recipe of ViT-L/14; the published ViT-B is distilled, and better.

    Nobody published how a small model trains from scratch. All is that of ``vitl14`` but the architecture, which is the
    published one, with an MLP; half its drop path, as there is less capacity to spare; and larger micro-batches.
    """
    return _imagenet22k(
        Path("runs/vitb14"), ViTConfig.of("vit_base", patch_size=14, drop_path_rate=0.2), accumulation_steps=48
    )


def vits14() -> PretrainConfig:
    """ViT-S/14 from scratch, by the recipe of ViT-L/14; the published ViT-S is distilled, and better.

    As ``vitb14``, with a drop path of 0.1.
    """
    return _imagenet22k(
        Path("runs/vits14"), ViTConfig.of("vit_small", patch_size=14, drop_path_rate=0.1), accumulation_steps=24
    )


def _imagenet22k(output: Path, vit: ViTConfig, *, accumulation_steps: int) -> PretrainConfig:
    """What the long runs share: Sinkhorn-Knopp, separate heads, 500 "epochs"."""
    return PretrainConfig(
        output=output,
        steps=625_000,
        batch_size=3072,
        accumulation_steps=accumulation_steps,
        precision="bf16",
        vit=vit,
        dino_head=HeadConfig(out_dim=131072, hidden_dim=2048, bottleneck_dim=384, num_layers=3),
        ibot_head=HeadConfig(out_dim=131072, hidden_dim=2048, bottleneck_dim=256, num_layers=3),
        objective=ObjectiveConfig(centering="sinkhorn_knopp"),
        data=DataConfig(root=IMAGES, augmentation=AugmentationConfig(local_size=98)),
        optim=OptimConfig(
            base_lr=2e-4,
            warmup_fraction=0.16,
            weight_decay_end=0.2,
            layer_decay=1.0,
            freeze_last_layer_fraction=0.002,
        ),
        teacher=TeacherConfig(momentum=0.994, temperature_warmup_fraction=0.06),
        log_every=50,
        probe_every=12_500,
        checkpoint_every=1250,
    )
