"""Bytes that one process sends in a step.

Collectives are counted as rings send them: of b bytes, a reduction or a gathering among N processes sends (N - 1) / N b
from each, and an all-reduce, which is one and then the other, twice that.
"""

from __future__ import annotations

from dinov2.train.config import PretrainConfig
from dinov2.train.planning.memory import Parameters, bytes_of_products, shards
from dinov2.train.planning.sizes import Rows
from dinov2.train.planning.stages import FLOAT


def bytes_sent(
    config: PretrainConfig, parameters: Parameters, rows: Rows, *, world_size: int, device_type: str
) -> dict[str, float]:
    """Bytes by what they are for: gradients, weights, and statistics of the batch."""
    share = shards(config, world_size)
    replicas = world_size // share
    gradients = _ring(share, FLOAT * parameters.student) + 2 * _ring(replicas, FLOAT * parameters.student / share)
    # Blocks in the precision of their products, all else in float32; the student's once more in the backward pass.
    narrow = bytes_of_products(config, device_type) * parameters.blocks
    student = narrow + FLOAT * (parameters.student - parameters.blocks)
    teacher = student * parameters.teacher / parameters.student
    return {
        "gradients": gradients,
        "weights": config.accumulation_steps * _ring(share, 2 * student + teacher),
        "statistics": config.accumulation_steps * _statistics(config, rows, world_size),
    }


def _statistics(config: PretrainConfig, rows: Rows, world_size: int) -> float:
    """Of one pass: Sinkhorn-Knopp's vectors over the prototypes, or mean features; class tokens for KoLeo."""
    heads = [config.dino_head, config.ibot_head or config.dino_head]
    if config.objective.centering == "sinkhorn_knopp":
        vectors = config.objective.sinkhorn_iterations * sum(head.out_dim for head in heads)
    else:
        vectors = sum(head.bottleneck_dim + 1 for head in heads)
    class_tokens = world_size * rows.teacher.num_sequences * config.vit.embed_dim
    return 2 * _ring(world_size, FLOAT * vectors) + _ring(world_size, FLOAT * class_tokens)


def _ring(processes: int, size: float) -> float:
    return (processes - 1) / processes * size
