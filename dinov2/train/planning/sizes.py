"""What follows from the sizes of a run by arithmetic: rows, parameters, and bytes that processes send each other.

Collectives are counted as rings send them: of b bytes, a reduction or a gathering among N processes sends (N - 1) / N b
from each, and an all-reduce, which is one and then the other, twice that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from dinov2.models import DINOHead, VisionTransformer
from dinov2.train.config import PretrainConfig
from dinov2.train.flops import masked_patches
from dinov2.train.precision import DTYPES, copied_parameters, definite
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual.sampling import num_kept_samples

FLOAT = 4
"""Bytes of float32."""

PROCESSES_OF_A_MACHINE = 8
"""A machine with GPUs runs this many, unless the configuration says otherwise."""


@dataclass(frozen=True)
class Rows:
    """How many tokens and rows go through the networks in one forward and backward pass of one process.

    Attributes:
        images: B.
        crops: the student's crops, 2 B global and L B local ones, as runs of sequences.
        teacher: the teacher's, 2 B global ones.
        local: L B local crops.
        masked: masked patches, an expected number.
    """

    images: int
    crops: PackedLayout
    teacher: PackedLayout
    local: int
    masked: float

    @classmethod
    def of(cls, config: PretrainConfig, images: int) -> Rows:
        """Those of a process that takes ``images`` images in one pass."""
        views, vit = config.data.augmentation, config.vit
        prefix = 1 + vit.num_register_tokens
        patches = (views.global_size // vit.patch_size) ** 2
        local_patches = (views.local_size // vit.patch_size) ** 2
        local = views.local_crops * images
        runs = [(2 * images, prefix + patches)]
        return cls(
            images=images,
            crops=PackedLayout([*runs, (local, prefix + local_patches)] if local else runs),
            teacher=PackedLayout(runs),
            local=local,
            masked=masked_patches(config.data.masks, 2 * images, patches),
        )

    def kept(self, rate: float) -> int:
        """Tokens that stochastic depth at this rate sends through a residual branch."""
        return sum(num_kept_samples(count, rate) * length for count, length in self.crops.runs)


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

    @classmethod
    def of(cls, student: nn.ModuleDict, teacher: nn.ModuleDict) -> Parameters:
        """Count them; the networks may be on the meta device."""
        backbone = cast(VisionTransformer, student["backbone"])
        heads = [cast(DINOHead, module) for name, module in student.items() if name != "backbone"]
        return cls(
            modules={name: _count(module) for name, module in student.items()},
            teacher=_count(teacher),
            blocks=_count(backbone.blocks),
            block=_count(backbone.blocks[0]),
            prototypes=max(_count(head.last_layer) for head in heads),
            copied=sum(weight.numel() for network in (student, teacher) for _, _, weight in copied_parameters(network)),
        )


def bytes_sent(
    config: PretrainConfig, parameters: Parameters, rows: Rows, *, world_size: int, device_type: str
) -> dict[str, float]:
    """Bytes that one process sends in a step, by what they are for: gradients, weights, and statistics of the batch."""
    share = shards(config, world_size)
    replicas = world_size // share
    gradients = _ring(share, FLOAT * parameters.student) + 2 * _ring(replicas, FLOAT * parameters.student / share)
    # Blocks in the precision of their products, all else in float32; the student's once more in the backward pass.
    narrow = dtype_of_products(config, device_type).itemsize * parameters.blocks
    student = narrow + FLOAT * (parameters.student - parameters.blocks)
    teacher = student * parameters.teacher / parameters.student
    return {
        "gradients": gradients,
        "weights": config.accumulation_steps * _ring(share, 2 * student + teacher),
        "statistics": config.accumulation_steps * _statistics(config, rows, world_size),
    }


def batch_bytes(config: PretrainConfig, rows: Rows) -> float:
    """Crops of one pass in float32, and masks."""
    views, channels = config.data.augmentation, config.vit.in_chans
    pixels = rows.teacher.num_sequences * views.global_size**2 + rows.local * views.local_size**2
    return FLOAT * channels * pixels + rows.teacher.total_tokens


def dtype_of_products(config: PretrainConfig, device_type: str) -> torch.dtype:
    """What products and attention result in."""
    return DTYPES[definite(config.precision, torch.device(device_type))]


def shards(config: PretrainConfig, world_size: int) -> int:
    """Processes that hold the networks together."""
    if config.parallel.sharding == "replicate":
        return 1
    if config.parallel.sharding == "full":
        return world_size
    return min(world_size, config.parallel.shard_size or PROCESSES_OF_A_MACHINE)


def _statistics(config: PretrainConfig, rows: Rows, world_size: int) -> float:
    """Bytes of one pass: Sinkhorn-Knopp's vectors over the prototypes, or mean features; class tokens for KoLeo."""
    heads = [config.dino_head, config.ibot_head or config.dino_head]
    if config.objective.centering == "sinkhorn_knopp":
        vectors = config.objective.sinkhorn_iterations * sum(head.out_dim for head in heads)
    else:
        vectors = sum(head.bottleneck_dim + 1 for head in heads)
    class_tokens = world_size * rows.teacher.num_sequences * config.vit.embed_dim
    return 2 * _ring(world_size, FLOAT * vectors) + _ring(world_size, FLOAT * class_tokens)


def _ring(processes: int, size: float) -> float:
    return (processes - 1) / processes * size


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
