"""From a run, a checkpoint or another file of weights to a folder that our, transformers' or timm's loader reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dinov2.export.formats import WRITERS, Format
from dinov2.models import save_heads
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
    format: Format = "facebook",
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
        format: whose names and ``config.json``: facebook's names and our own configuration; transformers, for
            ``AutoModel.from_pretrained``; timm, for ``timm.create_model("local-dir:...")``. Heads keep their names.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something already.
        FileNotFoundError, ValueError: the source is not there, cannot be read, has no heads to write, or is no model
            that the format can describe.
    """
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output folder {output} is not empty: choose a new one")
    weights = getattr(read_networks(source, step=step, student=student), network)
    if heads and not weights.heads:
        raise ValueError(f"{weights.origin} has no heads to export")
    WRITERS[format](weights, output)
    return save_heads(weights, output) if heads else output
