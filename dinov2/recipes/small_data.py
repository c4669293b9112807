"""A starting point for people with ten thousand to a million images of their own and one GPU."""

from __future__ import annotations

from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.train.config import OptimConfig, PretrainConfig, TeacherConfig


def vits14_small_data() -> PretrainConfig:
    """ViT-S/14 with registers on 10,000 to a million images of your own; one GPU.

    What differs from the large runs, and why:

    - 16,384 prototypes: with few images most of 65,536 would never be anybody's target.
    - Sinkhorn-Knopp: it balances the prototypes within each batch, where a running centre reacts too late; a loss that
      sits at ln(prototypes) or falls to 0 early is collapse, and this is the first thing to try against it.
    - Teacher momentum 0.996: a smaller batch makes noisier students, so the teacher averages over more of them.
    - Smaller drop path: ViT-S has little capacity to spare.
    - Prototypes stand still for 2 % of the run, twice as long, while features are still random.
    - The batch in one piece: prefer memory for a larger micro-batch over accumulation, as Sinkhorn-Knopp and KoLeo
      look at one micro-batch at a time.

    If the images are alike (microscopy, X-ray, satellite), crop less: ``--data.augmentation.global_scale 0.5 1``; if
    their colours carry the meaning, jitter less: ``--data.augmentation.hue 0 --data.augmentation.grayscale 0``.
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
