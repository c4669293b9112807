"""The networks of a run: read from checkpoints or files of weights, given to a new run, taught by, exported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from dinov2.models import HeadConfig, VisionTransformer, ViTConfig, Weights, read_weights, save_heads
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.models.checkpoints.weights import WRITERS, Format, split_heads
from dinov2.objectives import SelfDistillation
from dinov2.train.config import DistillConfig, RunConfig
from dinov2.train.run_directory import is_run, read_config
from dinov2.train.saving import CheckpointDirectory, step_of

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


def start_from_initial_weights(objective: SelfDistillation, config: RunConfig) -> str | None:
    """Give a new run the weights that ``config.initial_weights`` names; without a name do nothing.

    A run's checkpoint gives student, moving average, heads and centres as they were; of any other source both networks
    take the same weights. Position embeddings are resampled to the run's image size. A head that the source lacks, or
    has with other sizes, starts anew, as does its centre.

    Returns:
        In words, where the weights are from and what started anew.

    Raises:
        FileNotFoundError, ValueError: there is nothing, it cannot be read, or the backbone is of another architecture.
    """
    if config.initial_weights is None:
        return None
    wanted = {"dino_head": config.dino_head} | ({"ibot_head": config.ibot_head} if config.ibot_head else {})
    notes: dict[str, None] = {}  # a set in the order of insertion
    for name, student in objective.students.items():
        networks = read_networks(config.initial_weights, student=name if isinstance(config, DistillConfig) else None)
        notes |= {f"from {networks.teacher.origin}": None}
        fitting = {head: difference(networks.teacher, head, expected) for head, expected in wanted.items()}
        notes |= {
            f"{objective.label(name, head)} starts anew ({reason})": None for head, reason in fitting.items() if reason
        }
        heads = [head for head, reason in fitting.items() if not reason]
        load_whole(student, _tensors(student, networks.student, heads))
        load_whole(objective.averages[name], _tensors(student, networks.teacher, heads))
        load_centers(objective, networks.teacher, heads)
    return "; ".join(notes)


def difference(weights: Weights, head: str, wanted: HeadConfig) -> str | None:
    """Why a head cannot be taken over, in words; None if it can."""
    if head not in weights.heads:
        return "the weights come without it"
    there, here = asdict(weights.head_config(head)), asdict(wanted)
    differing = [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    return ", ".join(differing) or None


def load_whole(network: nn.ModuleDict, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a network, which may be split among processes; it keeps what is not among them."""
    if unknown := tensors.keys() - network.state_dict().keys():
        raise ValueError(f"the weights have tensors that the model lacks: {', '.join(sorted(unknown)[:5])}")
    set_model_state_dict(network, dict(tensors), options=StateDictOptions(full_state_dict=True, strict=False))


def _tensors(student: nn.ModuleDict, weights: Weights, heads: list[str]) -> dict[str, Tensor]:
    """Tensors by their names in a network: the backbone at its image size, and these heads."""
    vit = cast(VisionTransformer, student["backbone"]).config
    parts = {"backbone": weights.backbone_for(vit)} | {head: weights.heads[head] for head in heads}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@torch.no_grad()
def load_centers(objective: SelfDistillation, weights: Weights, heads: list[str]) -> None:
    """Continue the centres that belong to these heads, where the objective and the weights have any."""
    own = dict(objective.named_buffers())
    patch_head = "ibot_head" if "ibot_head" in objective.teacher else "dino_head"
    for name, head in {"dino_centering.center": "dino_head", "ibot_centering.center": patch_head}.items():
        center = weights.centers.get(CENTERS[name])
        if name in own and head in heads and center is not None:
            own[name].copy_(center.flatten())


def read_teacher(path: Path) -> Weights:
    """A network that can teach: a backbone with the heads that it was trained with.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it cannot be read, or has no heads.
    """
    teacher = read_networks(path).teacher
    if "dino_head" not in teacher.heads:
        raise ValueError(
            f"{path} has no heads, so it cannot teach: students learn what a teacher's heads say of an image."
            " A run, its checkpoints, an export with heads (dinov2 export --heads) and facebook's"
            " teacher_checkpoint.pth have them; published weights do not"
        )
    return teacher


def read_frozen_teacher(config: DistillConfig) -> Weights:
    """The teacher that a distillation was configured with.

    Raises:
        FileNotFoundError: it is not there any more.
        ValueError: there are other weights now.
    """
    teacher = read_teacher(config.frozen_teacher)
    found = digest(teacher)
    if found != config.frozen_teacher_sha256:
        raise ValueError(
            f"frozen_teacher {config.frozen_teacher} is not the teacher of this run: the digest of its weights is"
            f" {found[:16]}..., but must be {config.frozen_teacher_sha256[:16] or 'given'}..."
        )
    return teacher


def digest(weights: Weights) -> str:
    """SHA-256 of names, types, shapes and numbers of backbone and heads, in whatever file they are."""
    result = hashlib.sha256()
    for name, tensor in sorted(weights.named_tensors().items()):
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        result.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()
