"""What a run does to the blocks of its networks before it trains: dtype of tokens, recomputed activations, compiling.

Each changes how blocks compute and nothing else: parameters keep their names, so checkpoints do not tell. The order
counts: a compiled block includes its recomputation, and FSDP gathers the weights of a compiled block around it.
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
"""Operators whose results selective checkpointing keeps: nearly all arithmetic of a block. They are 11 times its
tokens, of the 14 that it keeps otherwise; norms, activations, gathers and scatters are made again."""


def prepare_blocks(objective: SelfDistillation, config: RunConfig) -> None:
    """Apply ``activation_checkpointing`` to the students' blocks and ``compile`` to those of all networks that run.

    ``residual_in_fp32`` holds for all networks, those that only a probe runs among them.
    """
    for network in objective.networks:
        cast(VisionTransformer, network["backbone"]).residual_in_fp32 = config.residual_in_fp32
    students = list(objective.students.values())
    for network in [*students, objective.teacher]:
        for block in cast(VisionTransformer, network["backbone"]).blocks:
            if network in students:
                recompute(block, config.activation_checkpointing)
            if config.compile:
                # Crops have few sizes, so a graph for each is right; blocks share it, as only their weights differ.
                block.compile(fullgraph=True, dynamic=False)
    if config.compile:
        # Numbers of kept samples are constants of a graph, and more graphs than this limit are an error.
        graphs = 1 + sum(len(set(vit.drop_path_rates)) for vit in config.networks.values())
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * graphs)


def recompute(block: nn.Module, what: ActivationCheckpointing) -> None:
    """Let ``block`` make its activations again in the backward pass, bit by bit.

    A block draws no random numbers: its network hands it the samples that stochastic depth keeps. So the state of the
    generators need not be kept.
    """
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    forward = block.forward

    # A function of its own, and no partial: torch.compile must see into it.
    def recomputing(x: Tensor, layout: PackedLayout, subsets: Sequence[Subset]) -> Any:
        return checkpoint(forward, x, layout, subsets, **options)

    block.forward = recomputing


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
