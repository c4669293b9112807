"""Recipes that build on a pretrained network: adaptation to a higher resolution, and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path

from dinov2.data import AugmentationConfig, DataConfig
from dinov2.interrupts import uninterrupted
from dinov2.models import ViTConfig
from dinov2.objectives import ObjectiveConfig
from dinov2.recipes.pretraining import IMAGES
from dinov2.train.config import DistillConfig, OptimConfig, PretrainConfig, TeacherConfig
from dinov2.train.run_directory import read_config

STEPS = 10_000
"""The published adaptation has this many steps."""
LR_FACTOR = 0.1
"""The published rate is "reduced", by an unknown factor."""
BATCH_SIZE = 2048
PEAK_LR = 1e-3


def adaptation(run: Path, image_size: int, steps: int = STEPS) -> PretrainConfig:
    """Continue from a run's newest checkpoint with larger images.

    The published adaptation takes 10,000 steps at 518 pixels, keeps all hyperparameters, compresses all schedules to
    these steps, and reduces the learning rate. So every field is as in the run, with these exceptions:

    - ``initial_weights`` is the checkpoint: student, EMA teacher, heads and centres continue, position embeddings are
      resampled, and the optimiser starts anew.
    - ``vit.img_size`` and ``data.augmentation.global_size`` are ``image_size``.
    - ``data.augmentation.local_size`` grows by the same factor, rounded to whole patches, so local crops keep the same
      scale as global crops. This is not published.
    - ``optim.base_lr`` is a tenth. This is not published either. The run ended at a rate near zero. Its full rate would
      first undo part of what the last, slow steps learned, and 10,000 steps are few to learn it again.
    - ``output`` is a new folder beside the run.

    Args:
        run: directory of a pretraining run.
        image_size: side of the global crops in pixels, a multiple of the patch size.
        steps: number of optimiser steps.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint.
        ValueError: the run is a distillation, or the image size does not fit the patches.
    """
    config = read_config(run)
    if not isinstance(config, PretrainConfig):
        raise ValueError(
            f"{run} is a {config.kind}: adaptation continues a student and its teacher, so it needs a run of"
            " pretraining, such as that of the frozen teacher; or distil with larger --data.augmentation.global_size"
        )
    with uninterrupted():  # after the checks, which need no PyTorch
        from dinov2.train.networks import checkpoint_of

    vit, views = replace(config.vit, img_size=image_size), config.data.augmentation
    local_size = vit.patch_size * round(views.local_size * image_size / views.global_size / vit.patch_size)
    augmentation = replace(views, global_size=image_size, local_size=local_size)
    return replace(
        config,
        output=folder_of(run, image_size),
        steps=steps,
        initial_weights=checkpoint_of(run),
        vit=vit,
        data=replace(config.data, augmentation=augmentation),
        optim=replace(config.optim, base_lr=LR_FACTOR * config.optim.base_lr),
    )


def folder_of(run: Path, image_size: int) -> Path:
    """The default directory of an adapted run: ``runs/first-518`` beside ``runs/first``."""
    return run.with_name(f"{run.resolve().name}-{image_size}")


def distillation(teacher: Path, students: Sequence[str], data: DataConfig | None = None) -> DistillConfig:
    """Train students of a frozen teacher by the published recipe, for 625,000 steps of 2048 images.

    The published recipe has learning rate 1e-3, no stochastic depth, an MLP as feed-forward layer, weight decay 0.04 to
    0.2, 100,000 steps of warm-up and momentum 0.994 to 1. The rest is the teacher's recipe, ``vitg14``. The published
    table gives final learning rates: for models trained from scratch it says 3.5e-4, which is ``base_lr`` 2e-4 times
    sqrt(3072 / 1024). So ``base_lr`` here is 1e-3 / sqrt(2).

    Students have the teacher's patch size, channels and registers, and heads of the same sizes as the teacher's. If the
    teacher is a run, they take its images, views, centring and temperatures, with which its heads were trained.

    Args:
        teacher: a run, its checkpoint, an export with heads, or facebook's ``teacher_checkpoint.pth``.
        students: architectures, such as ``vit_small``; also the names of the students.
        data: images and views; the default is those of the teacher's run, or DINOv2's views if the teacher is a file
            of weights.

    Raises:
        FileNotFoundError: the teacher does not exist.
        ValueError: the teacher cannot be read or has no heads, or an architecture is unknown.
    """
    for name in students:
        ViTConfig.of(name)  # an unknown one is found before the teacher is read
    with uninterrupted():
        from dinov2.train.networks import digest, read_teacher, run_of

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
