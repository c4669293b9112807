"""The networks of a run, read from its checkpoints, or from files of weights that anyone wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from dinov2.models import ViTConfig, Weights, read_weights, save_heads
from dinov2.models.checkpoints.weights import WRITERS, Format, split_heads
from dinov2.train.checkpoint import CheckpointDirectory, load_checkpoint, step_of
from dinov2.train.config import DistillConfig, RunConfig
from dinov2.train.config_file import is_run, read_config

CENTERS = {"dino_centering.center": "dino_loss.center", "ibot_centering.center": "ibot_patch_loss.center"}
"""Names of the centres in an objective, and in files of weights."""
Network = Literal["teacher", "student"]


class Networks(NamedTuple):
    """A student and its moving average, the teacher; the same weights twice where only one network is known."""

    student: Weights
    teacher: Weights


def read_networks(source: Path, *, step: int | None = None, student: str | None = None) -> Networks:
    """The networks that a path names.

    Args:
        source: the directory of a run, whose newest checkpoint counts; a checkpoint in one; or any file or folder that
            :func:`dinov2.models.read_weights` reads.
        step: of a run, the checkpoint after this many steps.
        student: the one to read, where the source is a distillation of several.

    Raises:
        FileNotFoundError: there is nothing, or no such checkpoint.
        ValueError: it cannot be read, or holds several students and none was chosen.
    """
    if is_run(source):
        source = checkpoint_of(source, step)
    elif step is not None:
        raise ValueError(
            f"a step can be chosen among the checkpoints of a run, but {source} is not the directory of one"
        )
    if not is_checkpoint(source):
        weights = read_weights(source)
        return Networks(weights, weights)
    config = read_config(source.parent.parent)
    vit, prefix = _choose(config, student, source)
    state = load_checkpoint(source, parts=("student", "teacher", "objective"))
    centers = {CENTERS[name]: tensor for name, tensor in state["objective"].items() if name in CENTERS}
    if isinstance(config, DistillConfig):
        centers = {}  # those of the frozen teacher
    return Networks(
        *(
            Weights(str(source), replace(vit, drop_path_rate=0.0), *_parts(state[role], prefix), centers)
            for role in ("student", "teacher")
        )
    )


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """The checkpoint of a run after ``step`` steps, or its newest.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = CheckpointDirectory(run / "checkpoints", keep=1).all()
    if not checkpoints:
        raise FileNotFoundError(f"the run {run} has no checkpoint")
    if step is None:
        return checkpoints[-1]
    steps = {step_of(path): path for path in checkpoints}
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise FileNotFoundError(f"the run {run} has no checkpoint of step {step}; there are those of {there}")
    return steps[step]


def run_of(source: Path) -> Path | None:
    """The directory of the run that a path names, or of which it is a checkpoint; None if it is neither."""
    if is_run(source):
        return source
    return source.parent.parent if is_checkpoint(source) else None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the checkpoint of a run, by its name and place."""
    try:
        step_of(path)
    except ValueError:
        return False
    return is_run(path.parent.parent)


def _choose(config: RunConfig, student: str | None, source: Path) -> tuple[ViTConfig, str]:
    """Architecture of the network to read, and the prefix of its tensors."""
    if not isinstance(config, DistillConfig):
        return config.networks["vit"], ""
    names = list(config.students)
    if student is None and len(names) > 1:
        raise ValueError(
            f"{source} holds the students {', '.join(names)}: name one, or export it first (dinov2 export --student)"
        )
    student = student or names[0]
    if student not in names:
        raise ValueError(f"{source} holds the students {', '.join(names)}, but not {student}")
    return config.students[student], f"{student}."


def _parts(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Backbone, and heads by name, of the network whose tensors have this prefix."""
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    parts = split_heads(mine)
    return parts.pop("backbone"), parts


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
