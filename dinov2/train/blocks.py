"""Preparation of a run's blocks before training: dtype of tokens, activation checkpointing, compilation.

These change only how blocks compute. Parameters keep their names, so checkpoints stay the same. The order matters: a
compiled block includes its activation checkpointing, and FSDP gathers weights outside the compiled block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dinov2.models import VisionTransformer
from dinov2.objectives import SelfDistillation
from dinov2.train.config import ActivationCheckpointing, RunConfig
from dinov2_kernels import PackedLayout
from dinov2_kernels.residual import Subset

KEPT = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.dinov2_kernels.attention_forward.default,
    }
)
"""Operators whose results selective checkpointing keeps: nearly all arithmetic of a block. The results take 11 times
the memory of the block's tokens, instead of 14 times. Norms, activations, gathers and scatters are recomputed."""


def prepare_blocks(objective: SelfDistillation, config: RunConfig) -> None:
    """Apply ``activation_checkpointing`` to the students' blocks and ``compile`` to those of students and teacher.

    ``residual_in_fp32`` applies to all networks, including those that only a probe runs.
    """
    for network in objective.networks:
        cast(VisionTransformer, network["backbone"]).residual_in_fp32 = config.residual_in_fp32
    students = list(objective.students.values())
    for network in [*students, objective.teacher]:
        for block in cast(VisionTransformer, network["backbone"]).blocks:
            if network in students:
                recompute(block, config.activation_checkpointing)
            if config.compile:
                # Crops have few sizes, so each size may have its own graph. Blocks share it: only their weights differ.
                block.compile(fullgraph=True, dynamic=False)
    if config.compile:
        # The number of kept samples is a constant of a graph, and PyTorch fails with more graphs than this limit.
        graphs = 1 + sum(len(set(vit.drop_path_rates)) for vit in config.networks.values())
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * graphs)


def recompute(block: nn.Module, what: ActivationCheckpointing) -> None:
    """Let ``block`` recompute its activations in the backward pass, with bitwise equal results.

    A block draws no random numbers: its network passes in the samples that stochastic depth keeps. So generator states
    are not stored.
    """
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    forward = block.forward

    # A function and not a partial, because torch.compile must trace it.
    def recomputing(x: Tensor, layout: PackedLayout, subsets: Sequence[Subset]) -> Any:
        return checkpoint(forward, x, layout, subsets, **options)

    block.forward = recomputing


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
