"""Bytes that one process holds at the peak of a training step, walked through stage by stage.

Weights, moments and teacher stand all the time. The teacher runs first and leaves its logits; the student's forward
pass adds what its stages keep; the backward pass gives that back from the last stage to the first, and adds gradients.
The peak is the largest sum on this way. Left out are libraries' own buffers, and a few vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dinov2.models import DINOHead, VisionTransformer, ViTConfig
from dinov2.train.config import PretrainConfig
from dinov2.train.planning.sizes import Rows
from dinov2.train.planning.stages import (
    FLOAT,
    Stage,
    backbone_stages,
    feed_forward_widths,
    head_stage,
    prototype_stages,
)
from dinov2.train.precision import DTYPES, definite
from dinov2.train.weight_copies import copied_parameters, keeps_weight_copies

PROCESSES_OF_A_MACHINE = 8
"""Of a machine with GPUs, where nobody says otherwise."""

Bytes = dict[str, float]
"""Bytes by kind."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        modules: of each module of the student, by name.
        teacher: of the teacher, and of what else follows the student.
        blocks: of all blocks of the student.
        block: of one block, which is gathered at a time where networks are split.
        prototypes: of the largest last layer of a head, likewise.
        copied: of the linear layers of student and teacher, of which low precision keeps copies.
    """

    modules: Mapping[str, int]
    teacher: int
    blocks: int
    block: int
    prototypes: int
    copied: int

    @property
    def student(self) -> int:
        """All that is trained."""
        return sum(self.modules.values())


@dataclass(frozen=True)
class Peak:
    """The largest sum of a step.

    Attributes:
        moment: where it falls.
        bytes: what is held then, by kind.
    """

    moment: str
    bytes: Bytes

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.bytes.values())


def peak_memory(
    config: PretrainConfig, parameters: Parameters, rows: Rows, *, world_size: int, device_type: str
) -> Peak:
    """The peak of a step after the first one, in which the optimiser's moments are already there.

    Args:
        config: the run.
        parameters: of its networks.
        rows: of one pass of one process.
        world_size: processes.
        device_type: where they train.
    """
    return max(_moments(config, parameters, rows, world_size, device_type), key=lambda peak: peak.total)


def _moments(
    config: PretrainConfig, parameters: Parameters, rows: Rows, world_size: int, device_type: str
) -> Iterator[Peak]:
    e = bytes_of_products(config, device_type)
    share = shards(config, world_size)
    is_split = share > 1
    held = {
        "weights": FLOAT * parameters.student / share,
        "moments": 2 * FLOAT * parameters.student / share,
        "teacher": FLOAT * parameters.teacher / share,
        "batch": batch_bytes(config, rows),
    }
    # Gradients of earlier micro-batches are whole; DistributedDataParallel keeps buckets for all of them at any time.
    has_gradients = config.accumulation_steps > 1 or (world_size > 1 and not is_split)
    whole = FLOAT * parameters.student if has_gradients else 0.0
    if is_split:
        # A block, the next one, and the buffer in which that arrives; or prototypes, in float32, and their buffer.
        held["gathered weights"] = max(3 * e * parameters.block, 2 * FLOAT * parameters.prototypes)
        # Gradients as they are made, and in float32 to be averaged.
        leaving = max((e + FLOAT) * parameters.block, 2 * FLOAT * parameters.prototypes)
    keeps_copies = keeps_weight_copies(config, device_type, is_split=is_split)
    if keeps_copies:
        held["copies of weights"] = e * parameters.copied
    targets = teacher_logits(config, rows, e)
    working = teacher_working(config.vit, rows, e, bytes_of_tokens(config, e))
    if config.cuda_graph:
        # Graphs keep their memory. Inputs are copied for them, and statistics of the targets take memory beside it.
        statistics = working + e * rows.teacher.num_sequences * config.dino_head.out_dim
        held["beside the graphs"] = batch_bytes(config, rows) + statistics
    held_and_gradients = held | {"gradients": whole}
    yield Peak(
        "forward pass of the teacher", held_and_gradients | {"teacher logits": targets, "working memory": working}
    )

    kept: Bytes = {"teacher logits": targets}
    heads_cast = e < FLOAT and not keeps_copies
    blocks_cast = heads_cast and not is_split
    stages = list(student_stages(config, rows, e, device_type, blocks_cast=blocks_cast, heads_cast=heads_cast))
    for stage in stages:
        kept = _sum(kept, stage.kept)
        yield Peak(f"forward pass, {stage.name}", _sum(held_and_gradients, kept, {"working memory": stage.forward}))
    if config.objective.student_logits == "stored":
        del kept["teacher logits"]  # both losses come first in the backward pass
    made = 0.0
    for stage in reversed(stages):
        for moment in stage.backward:
            gradients = whole + moment.fresh if whole else made + moment.made
            if is_split:
                gradients = whole + made / share + leaving
            yield Peak(
                f"backward pass, {stage.name}",
                _sum(held, kept, {"gradients": gradients, "working memory": moment.working}),
            )
        kept = _sum(kept, {kind: -size for kind, size in stage.kept.items()})
        made += stage.gradient
    yield Peak("update of the weights", held | {"gradients": whole / share if whole else made / share})


def student_stages(
    config: PretrainConfig, rows: Rows, e: int, device_type: str, *, blocks_cast: bool, heads_cast: bool
) -> Iterator[Stage]:
    """The student's forward pass, in its order; ``blocks_cast``, ``heads_cast``: these cast their weights."""
    vit = config.vit
    yield from backbone_stages(
        vit, rows, e, bytes_of_tokens(config, e), checkpointing=config.activation_checkpointing, casts=blocks_cast
    )
    logits = (config.objective.student_logits, e, device_type)
    classes, patches = (rows.class_tokens, rows.teacher.num_sequences), (rows.masked, rows.masked)
    n = rows.class_tokens + rows.masked
    if config.ibot_head is None:
        yield head_stage("shared head", vit.embed_dim, config.dino_head, n, e, copied=True, casts=heads_cast)
        yield from prototype_stages(config.dino_head, {"class tokens": classes, "patches": patches}, *logits)
        return
    for name, head, count in (
        ("head of class tokens", config.dino_head, rows.class_tokens),
        ("head of patches", config.ibot_head, rows.masked),
    ):
        yield head_stage(name, vit.embed_dim, head, count, e, copied=e < FLOAT, casts=heads_cast)
    yield from prototype_stages(config.dino_head, {"class tokens": classes}, *logits)
    yield from prototype_stages(config.ibot_head, {"patches": patches}, *logits)


def teacher_logits(config: PretrainConfig, rows: Rows, e: int) -> float:
    """Logits of the teacher, which the losses keep."""
    patch_head = config.ibot_head or config.dino_head
    return e * (rows.teacher.num_sequences * config.dino_head.out_dim + rows.masked * patch_head.out_dim)


def teacher_working(vit: ViTConfig, rows: Rows, e: int, s: int) -> float:
    """What the teacher's blocks take while they run: tokens, and the argument and result of an activation."""
    width = vit.embed_dim + sum(feed_forward_widths(vit))
    return rows.teacher.total_tokens * (s * vit.embed_dim + e * width)


def batch_bytes(config: PretrainConfig, rows: Rows) -> float:
    """Crops of one pass in float32, and masks."""
    views, channels = config.data.augmentation, config.vit.in_chans
    pixels = rows.teacher.num_sequences * views.global_size**2 + rows.local * views.local_size**2
    return FLOAT * channels * pixels + rows.teacher.total_tokens


def bytes_of_products(config: PretrainConfig, device_type: str) -> int:
    """Bytes of an element of the result of a product."""
    return DTYPES[definite(config.precision, torch.device(device_type))].itemsize


def bytes_of_tokens(config: PretrainConfig, e: int) -> int:
    """Bytes of an element of the tokens between blocks, where a product's result has ``e``."""
    return FLOAT if config.residual_in_fp32 else e


def shards(config: PretrainConfig, world_size: int) -> int:
    """Processes that hold the networks together."""
    if config.parallel.sharding == "replicate":
        return 1
    if config.parallel.sharding == "full":
        return world_size
    return min(world_size, config.parallel.shard_size or PROCESSES_OF_A_MACHINE)


def parameters_of(student: nn.ModuleDict, teacher: nn.ModuleDict) -> Parameters:
    """Count them; the networks may be on the meta device."""
    backbone = cast(VisionTransformer, student["backbone"])
    heads = [cast(DINOHead, module) for name, module in student.items() if name != "backbone"]
    return Parameters(
        modules={name: _count(module) for name, module in student.items()},
        teacher=_count(teacher),
        blocks=_count(backbone.blocks),
        block=_count(backbone.blocks[0]),
        prototypes=max(_count(head.last_layer) for head in heads),
        copied=sum(weight.numel() for network in (student, teacher) for _, _, weight in copied_parameters(network)),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sum(*terms: Mapping[str, float]) -> Bytes:
    total: Bytes = {}
    for term in terms:
        for kind, size in term.items():
            total[kind] = total.get(kind, 0.0) + size
    return total
