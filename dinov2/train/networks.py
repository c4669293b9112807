"""The networks of a run: reading them, exporting them, starting a run from them, and the frozen teacher."""

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
from dinov2.models.checkpoints.weights import split_heads
from dinov2.models.checkpoints.writing import WRITERS, Format
from dinov2.objectives import SelfDistillation
from dinov2.train.config import DistillConfig, RunConfig
from dinov2.train.run_directory import is_run, read_config
from dinov2.train.saving import CheckpointDirectory, step_of

CENTERS = {"dino_centering.center": "dino_loss.center", "ibot_centering.center": "ibot_patch_loss.center"}
"""Name of each centre in an objective -> its name in files of weights."""
Network = Literal["teacher", "student"]


class Networks(NamedTuple):
    """A student and its moving average, the teacher. Both have the same weights if the source holds one network."""

    student: Weights
    teacher: Weights


def read_networks(source: Path, *, step: int | None = None, student: str | None = None) -> Networks:
    """Read the networks at a path.

    Args:
        source: a run directory (its newest checkpoint is read), a checkpoint of a run, or any file or folder that
            :func:`dinov2.models.read_weights` reads.
        step: read the checkpoint after this many steps; only if the source is a run directory.
        student: name of the student to read, if the source is a distillation of several.

    Raises:
        FileNotFoundError: the source or its checkpoint does not exist.
        ValueError: the source cannot be read, or holds several students and none was chosen.
    """
    if is_run(source):
        source = checkpoint_of(source, step)
    elif step is not None:
        raise ValueError(f"step: expected None for a source that is not a run directory, got {step} for {source}")
    if not is_checkpoint(source):
        weights = read_weights(source)
        return Networks(weights, weights)
    config = read_config(source.parent.parent)
    vit, prefix = _choose(config, student, source)
    state = load_checkpoint(source, parts=("student", "teacher", "objective"))
    centers = {CENTERS[name]: tensor for name, tensor in state["objective"].items() if name in CENTERS}
    if isinstance(config, DistillConfig):
        centers = {}  # a distillation's centres belong to its frozen teacher
    return Networks(
        *(
            Weights(str(source), replace(vit, drop_path_rate=0.0), *_parts(state[role], prefix), centers)
            for role in ("student", "teacher")
        )
    )


def checkpoint_of(run: Path, step: int | None = None) -> Path:
    """The checkpoint of a run after ``step`` steps, or the newest one.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
    """
    checkpoints = CheckpointDirectory(run / "checkpoints", keep=1).all()
    if not checkpoints:
        raise FileNotFoundError(f"the run {run} has no checkpoint")
    if step is None:
        return checkpoints[-1]
    steps = {step_of(path): path for path in checkpoints}
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise FileNotFoundError(f"the run {run} has no checkpoint of step {step}; it has those of {there}")
    return steps[step]


def run_of(source: Path) -> Path | None:
    """The run directory that a path names, or that contains it as a checkpoint; None for any other path."""
    if is_run(source):
        return source
    return source.parent.parent if is_checkpoint(source) else None


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the checkpoint of a run, judged by its name and its folder."""
    try:
        step_of(path)
    except ValueError:
        return False
    return is_run(path.parent.parent)


def _choose(config: RunConfig, student: str | None, source: Path) -> tuple[ViTConfig, str]:
    """The architecture of the network to read, and the prefix of its tensors' names."""
    if not isinstance(config, DistillConfig):
        return config.networks["vit"], ""
    names = list(config.students)
    if student is None and len(names) > 1:
        raise ValueError(
            f"student: expected one of {', '.join(names)}, which {source} holds, got None; or export one first"
            " (dinov2 export --student)"
        )
    student = student or names[0]
    if student not in names:
        raise ValueError(f"student: expected one of {', '.join(names)}, which {source} holds, got {student!r}")
    return config.students[student], f"{student}."


def _parts(state: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], Any]:
    """The backbone and the heads by name, from the tensors with this prefix."""
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
    """Write a backbone as ``model.safetensors`` and ``config.json``; ``heads`` adds ``heads.safetensors``.

    Args:
        source: a run (its newest checkpoint is read), a checkpoint of a run, or any file or folder of weights that
            :func:`dinov2.models.load_pretrained` reads.
        output: a new or empty folder.
        network: the teacher, which has the better features, or the student that it averages. In a distillation, teacher
            means the moving average of the student.
        student: name of the student to write, if the source is a distillation of several.
        step: read the checkpoint after this many steps; only if the source is a run.
        heads: also write the heads with their prototypes and centres. Distillation and continued pretraining need them.
        format: names of the tensors and kind of ``config.json``. facebook has facebook's names and our configuration;
            transformers is for ``AutoModel.from_pretrained``; timm is for ``timm.create_model("local-dir:...")``. Heads
            keep facebook's names in every format.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty.
        FileNotFoundError, ValueError: the source does not exist, cannot be read, has no heads to write, or has an
            architecture that the format cannot describe.
    """
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output folder {output} is not empty: choose a new one")
    run = run_of(source)
    if student is not None and not (run and isinstance(read_config(run), DistillConfig)):
        raise ValueError(f"student: expected None, because {source} is no distillation with several, got {student!r}")
    weights = getattr(read_networks(source, step=step, student=student), network)
    if heads and not weights.heads:
        raise ValueError(f"{weights.origin} has no heads to export")
    WRITERS[format](weights, output)
    return save_heads(weights, output) if heads else output


def start_from_initial_weights(objective: SelfDistillation, config: RunConfig) -> str | None:
    """Load the weights of ``config.initial_weights`` into a new run; do nothing if it is None.

    A run's checkpoint restores the student, its moving average, the heads and the centres. From any other source, both
    networks take the same weights. Position embeddings are resampled to the run's image size. If the source lacks a
    head or has it with other sizes, the head and its centre start anew.

    Returns:
        A text that says where the weights are from and what started anew; None without initial weights.

    Raises:
        FileNotFoundError, ValueError: the source does not exist, cannot be read, or has another architecture.
    """
    if config.initial_weights is None:
        return None
    wanted = {"dino_head": config.dino_head} | ({"ibot_head": config.ibot_head} if config.ibot_head else {})
    notes: dict[str, None] = {}  # keys only: a set that keeps its order
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
    """The reason why a head cannot be loaded, in words; None if it can."""
    if head not in weights.heads:
        return "the weights come without it"
    there, here = asdict(weights.head_config(head)), asdict(wanted)
    differing = [f"{name} is {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    return ", ".join(differing) or None


def load_whole(network: nn.ModuleDict, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a network, which may be split among processes. Its other tensors do not change."""
    if unknown := tensors.keys() - network.state_dict().keys():
        raise ValueError(f"the weights have tensors that the model lacks: {', '.join(sorted(unknown)[:5])}")
    set_model_state_dict(network, dict(tensors), options=StateDictOptions(full_state_dict=True, strict=False))


def _tensors(student: nn.ModuleDict, weights: Weights, heads: list[str]) -> dict[str, Tensor]:
    """The tensors of the backbone and of these heads by name; position embeddings have the backbone's image size."""
    vit = cast(VisionTransformer, student["backbone"]).config
    parts = {"backbone": weights.backbone_for(vit)} | {head: weights.heads[head] for head in heads}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@torch.no_grad()
def load_centers(objective: SelfDistillation, weights: Weights, heads: list[str]) -> None:
    """Load the centres of these heads, if both the objective and the weights have them."""
    own = dict(objective.named_buffers())
    patch_head = "ibot_head" if "ibot_head" in objective.teacher else "dino_head"
    for name, head in {"dino_centering.center": "dino_head", "ibot_centering.center": patch_head}.items():
        center = weights.centers.get(CENTERS[name])
        if name in own and head in heads and center is not None:
            own[name].copy_(center.flatten())


def read_teacher(path: Path) -> Weights:
    """Read a teacher: a backbone with the heads that it was trained with.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the weights cannot be read, or have no heads.
    """
    teacher = read_networks(path).teacher
    if "dino_head" not in teacher.heads:
        raise ValueError(
            f"{path} has no heads, so it cannot teach: students learn the output of a teacher's heads."
            " A run, its checkpoints, an export with heads (dinov2 export --heads) and facebook's"
            " teacher_checkpoint.pth have them; published weights do not"
        )
    return teacher


def read_frozen_teacher(config: DistillConfig) -> Weights:
    """Read the frozen teacher of a distillation and check its digest.

    Raises:
        FileNotFoundError: the teacher does not exist any more.
        ValueError: its weights have changed.
    """
    teacher = read_teacher(config.frozen_teacher)
    found = digest(teacher)
    if found != config.frozen_teacher_sha256:
        raise ValueError(
            "frozen_teacher: expected the teacher of this run, whose weights have the frozen_teacher_sha256"
            f" {config.frozen_teacher_sha256[:16]!r}..., got {found[:16]!r}... in {config.frozen_teacher}"
        )
    return teacher


def digest(weights: Weights) -> str:
    """SHA-256 of the names, dtypes, shapes and values of backbone and heads; the kind of file does not matter."""
    result = hashlib.sha256()
    for name, tensor in sorted(weights.named_tensors().items()):
        result.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        result.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()
