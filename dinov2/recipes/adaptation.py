"""A pretrained run at a higher resolution, for a short while (DINOv2, arXiv:2304.07193, section 4 and appendix B)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dinov2.train.config import PretrainConfig
from dinov2.train.networks import checkpoint_of
from dinov2.train.run_directory import read_config

STEPS = 10_000
"""As published."""
LR_FACTOR = 0.1
"""The published rate is "reduced", by an unknown factor."""


def adaptation(run: Path, image_size: int, steps: int = STEPS) -> PretrainConfig:
    """The configuration that goes on from a run's newest checkpoint with larger images.

    Published: 10,000 steps at 518 pixels; all hyperparameters as before, all schedules compressed to these steps, and
    a reduced learning rate. So every field is that of the run, but

    - ``initial_weights``: the checkpoint, of which student, teacher, heads and centres go on, position embeddings
      resampled; the optimiser starts anew;
    - ``vit.img_size`` and ``data.augmentation.global_size``: ``image_size``;
    - ``data.augmentation.local_size``: grows by the same factor, to whole patches. This is not published. It keeps what
      was learned with: local crops show things at the scale of the global ones;
    - ``optim.base_lr``: a tenth. This is not published either. The run has ended at a rate near zero; its full rate
      would first undo part of what the last, slow steps learned, and 10,000 steps are few to learn it again;
    - ``output``: a new folder beside the run.

    Args:
        run: the directory of a run of pretraining.
        image_size: side of the global crops in pixels, a multiple of the patch size.
        steps: optimiser steps.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint.
        ValueError: the run is a distillation, or the image size does not fit the patches.
    """
    config = read_config(run)
    if not isinstance(config, PretrainConfig):
        raise ValueError(
            f"{run} is a {config.kind}: adaptation goes on with a student and its teacher, so it needs a run of"
            " pretraining, such as that of the frozen teacher; or distil with larger --data.augmentation.global_size"
        )
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
    """Where a run is adapted unless told otherwise: ``runs/first-518`` beside ``runs/first``."""
    return run.with_name(f"{run.resolve().name}-{image_size}")
