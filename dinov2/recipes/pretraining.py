"""Recipes that pretrain from scratch: on a laptop, on few images, and as published.

The published runs train on ImageNet-1k in a day, and on ImageNet-22k for ViT-L and ViT-g. These recipes follow the
published tables with two differences. Position embeddings are interpolated with antialiasing and no offset, as in the
models with registers; Hugging Face and timm then compute the same with the weights. The length of a run is given in
steps: an "epoch" of the published runs is 1250 steps for any dataset.

``accumulation_steps`` splits the global batch into the micro-batches that one GPU of the published runs held, so KoLeo
compares the same number of images. On one GPU, a step therefore takes very long. The processes of ``torchrun`` share a
micro-batch: with N processes, divide ``accumulation_steps`` by N.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.train.config import OptimConfig, PretrainConfig, TeacherConfig

IMAGES = Path("images")
"""The recipes' folder of images; ``--data.root`` changes it."""


def photos() -> PretrainConfig:
    """Train a tiny ViT on the bundled photographs; it runs on a laptop and downloads nothing.

    The recipe is made for images of 128 pixels. A crop covers about as many pixels of the image as it has itself, so it
    keeps the scale, and two crops show two places of one neighbourhood.

    It differs from the published recipes, because it has minutes and thousands of images, not days and millions. The
    patches are small, because fine texture distinguishes these images. The batches are small, to allow many steps.
    There are few prototypes, with sharp, balanced targets. The learning rate is 0.001 in all layers, and LayerScale
    does not slow the start. Colours change only a little, because they carry meaning here.
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


def vits14_small_data() -> PretrainConfig:
    """Train ViT-S/14 with registers on 10,000 to a million images of your own, on one GPU.

    These are the differences from the large runs, and the reasons:

    - 16,384 prototypes: with few images, most of 65,536 prototypes would never be a target.
    - Sinkhorn-Knopp: it balances the prototypes within each batch, while a running centre reacts too late. A loss that
      stays at ln(prototypes) or falls to 0 early shows collapse, and this is the first remedy to try.
    - Teacher momentum 0.996: a smaller batch makes noisier students, so the EMA teacher averages over more steps.
    - Smaller drop path: ViT-S has little capacity to spare.
    - Prototypes are frozen for 2 % of the run, twice as long, while features are still random.
    - No gradient accumulation: use memory for a larger micro-batch instead, because Sinkhorn-Knopp and KoLeo see one
      micro-batch at a time.

    If the images are alike (microscopy, X-ray, satellite), crop less: ``--data.augmentation.global_scale 0.5 1``. If
    colours carry the meaning, jitter less: ``--data.augmentation.hue 0 --data.augmentation.grayscale 0``.
    """
    return PretrainConfig(
        output=Path("runs/vits14_small_data"),
        steps=50_000,
        batch_size=256,
        precision="bf16",
        vit=ViTConfig.of("vit_small", patch_size=14, num_register_tokens=4, drop_path_rate=0.1),
        dino_head=HeadConfig(out_dim=16384),
        objective=ObjectiveConfig(centering="sinkhorn_knopp"),
        data=DataConfig(root=Path("images"), augmentation=AugmentationConfig(local_size=98), num_workers=8),
        optim=OptimConfig(base_lr=2e-3, weight_decay_end=0.2, layer_decay=1.0, freeze_last_layer_fraction=0.02),
        teacher=TeacherConfig(momentum=0.996),
        log_every=20,
    )


def vitl16_short() -> PretrainConfig:
    """Train ViT-L/16 on ImageNet-1k for 125,000 steps of 2048 images (81.6 % k-NN published)."""
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
    """Train ViT-L/14 on ImageNet-22k for 625,000 steps of 3072 images (82.0 % k-NN published)."""
    return _imagenet22k(
        Path("runs/vitl14"),
        ViTConfig.of("vit_large", patch_size=14, ffn="swiglu", drop_path_rate=0.4),
        accumulation_steps=96,
    )


def vitg14() -> PretrainConfig:
    """Train ViT-g/14, the largest DINOv2, for 625,000 steps of 3072 images (83.5 % k-NN published, on LVD-142M)."""
    return _imagenet22k(
        Path("runs/vitg14"),
        ViTConfig.of("vit_giant2", patch_size=14, drop_path_rate=0.4),
        accumulation_steps=256,
    )


def vitb14() -> PretrainConfig:
    """Train ViT-B/14 from scratch by the recipe of ViT-L/14; the published ViT-B is distilled, and better.

    No recipe for training a small model from scratch is published. Everything is as in ``vitl14``, with three
    exceptions: the architecture is the published one, with an MLP; drop path is half as large, because there is less
    capacity to spare; micro-batches are larger.
    """
    return _imagenet22k(
        Path("runs/vitb14"), ViTConfig.of("vit_base", patch_size=14, drop_path_rate=0.2), accumulation_steps=48
    )


def vits14() -> PretrainConfig:
    """Train ViT-S/14 from scratch by the recipe of ViT-L/14; the published ViT-S is distilled, and better.

    Everything is as in ``vitb14``, but drop path is 0.1.
    """
    return _imagenet22k(
        Path("runs/vits14"), ViTConfig.of("vit_small", patch_size=14, drop_path_rate=0.1), accumulation_steps=24
    )


def _imagenet22k(output: Path, vit: ViTConfig, *, accumulation_steps: int) -> PretrainConfig:
    """The common part of the long runs: Sinkhorn-Knopp, separate heads, 500 "epochs"."""
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


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    function.__name__: function
    for function in (photos, vits14_small_data, vitl16_short, vits14, vitb14, vitl14, vitg14)
}
