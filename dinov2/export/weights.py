"""From a run, a checkpoint or another file of weights to ``model.safetensors`` and ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from dinov2.models import VisionTransformer, save_heads, save_pretrained
from dinov2.train.networks import read_networks

Network = Literal["teacher", "student"]


def export(
    source: Path,
    output: Path,
    *,
    network: Network = "teacher",
    student: str | None = None,
    step: int | None = None,
    heads: bool = False,
) -> Path:
    """Write a backbone as ``model.safetensors`` and ``config.json``, and with ``heads`` as ``heads.safetensors`` too.

    Args:
        source: a run (its newest checkpoint counts), a checkpoint in one, or any file or folder of weights that
            :func:`dinov2.models.load_pretrained` reads.
        output: a folder; new or empty.
        network: the teacher, which is the better one, or the student behind it. In a distillation, teacher means the
            moving average of the student.
        student: of a distillation with several students, the one to write.
        step: of a run, the checkpoint after this many steps.
        heads: also write the heads with their prototypes and centres, which distillation and continued pretraining
            need.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something already.
        FileNotFoundError, ValueError: the source is not there, cannot be read, or has no heads to write.
    """
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output folder {output} is not empty: choose a new one")
    weights = getattr(read_networks(source, step=step, student=student), network)
    if heads and not weights.heads:
        raise ValueError(f"{weights.origin} has no heads to export")
    if heads:
        save_heads(weights, output)
    return save_pretrained(cast(VisionTransformer, weights.network()["backbone"]), output)
