"""Students of a frozen teacher (DINOv2, arXiv:2304.07193, section 5 and table 16)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.models import ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.recipes.reference import IMAGES
from dinov2.train.config import DistillConfig, OptimConfig, TeacherConfig
from dinov2.train.networks import digest, read_teacher, run_of
from dinov2.train.run_directory import read_config

BATCH_SIZE = 2048
PEAK_LR = 1e-3


def distillation(teacher: Path, students: Sequence[str], data: DataConfig | None = None) -> DistillConfig:
    """The published recipe for students of a frozen teacher: 625,000 steps of 2048 images.

    Published: learning rate 1e-3, no stochastic depth, MLP as feed-forward layer, weight decay 0.04 to 0.2, 100,000
    steps of warm-up, momentum 0.994 to 1, and else the teacher's own recipe, which is that of ``vitg14``. The table
    gives learning rates as they are used: of the models trained from scratch it says 3.5e-4, which is ``base_lr`` 2e-4
    times sqrt(3072 / 1024). So ``base_lr`` here is 1e-3 / sqrt(2).

    Students have the teacher's patch size, channels and registers, and heads of the same sizes as the teacher's. Where
    the teacher is a run, they take from it what its heads were trained with: images and views, centring, temperature.

    Args:
        teacher: a run, its checkpoint, an export with heads, or facebook's ``teacher_checkpoint.pth``.
        students: architectures, such as ``vit_small``; also the names of the students.
        data: images and views; by default those of the teacher's run or, where the teacher is a file of weights,
            DINOv2's views.

    Raises:
        FileNotFoundError: there is no teacher.
        ValueError: it cannot be read or has no heads, or there is no architecture of this name.
    """
    weights = read_teacher(teacher)
    patch = weights.vit.patch_size
    run = run_of(teacher)
    before = None if run is None else read_config(run)
    if data is None and before is not None:
        data = before.data
    elif data is None:
        augmentation = AugmentationConfig(global_size=round(224 / patch) * patch, local_size=round(96 / patch) * patch)
        data = DataConfig(root=IMAGES, augmentation=augmentation)
    shape = {
        "img_size": data.augmentation.global_size,
        "patch_size": patch,
        "in_chans": weights.vit.in_chans,
        "num_register_tokens": weights.vit.num_register_tokens,
    }
    return DistillConfig(
        output=Path("runs") / "-".join(students),
        steps=625_000,
        batch_size=BATCH_SIZE,
        accumulation_steps=32,
        precision="bf16",
        students={name: ViTConfig.of(name, **shape) for name in students},
        frozen_teacher=teacher,
        frozen_teacher_sha256=digest(weights),
        dino_head=weights.head_config("dino_head"),
        ibot_head=weights.head_config("ibot_head") if "ibot_head" in weights.heads else None,
        objective=ObjectiveConfig(centering="sinkhorn_knopp") if before is None else before.objective,
        data=data,
        optim=OptimConfig(
            base_lr=PEAK_LR / sqrt(BATCH_SIZE / 1024),
            warmup_fraction=0.16,
            weight_decay_end=0.2,
            layer_decay=1.0,
            freeze_last_layer_fraction=0.002,
        ),
        teacher=replace(
            TeacherConfig(temperature_warmup_fraction=0.06) if before is None else before.teacher, momentum=0.994
        ),
        log_every=50,
        probe_every=12_500,
        checkpoint_every=1250,
    )
