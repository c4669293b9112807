"""Parameters, gradients and optimiser state split among the processes (FSDP2: ``torch.distributed.fsdp``).

Each process holds one part of every parameter. A block or head is gathered when it runs and let go afterwards; the
teacher's too, so that none of its gathered weights outlives the update that follows the student. While a block runs,
the next one is gathered.

Process 0 builds the networks whole, in host memory and as one process would; the others build them without memory, on
the meta device, and each gets its parts from process 0. No GPU ever holds a whole network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov2.models import DINOHead, VisionTransformer
from dinov2.objectives import SelfDistillation
from dinov2.train.config import ParallelConfig
from dinov2.train.processes import Processes


def split_objective(
    build: Callable[[], SelfDistillation], parallel: ParallelConfig, processes: Processes, dtype: torch.dtype
) -> SelfDistillation:
    """What ``build`` returns in process 0, with its networks split among the processes.

    Args:
        build: makes the objective on PyTorch's current default device.
        parallel: among which processes.
        processes: those of the run.
        dtype: in which blocks are gathered.
    """
    with torch.device("cpu" if processes.is_first else "meta"):
        objective = build()
    whole = objective.state_dict() if processes.is_first else {}
    objective.to("meta")
    mesh = mesh_of(parallel, processes)
    for network in objective.networks:
        split_network(network, mesh, dtype)
    objective.to_empty(device=processes.device)
    set_model_state_dict(objective, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return objective


def mesh_of(parallel: ParallelConfig, processes: Processes) -> DeviceMesh:
    """The processes [shard], or [replica, shard]: equal weights along replicas, parts of them along shards.

    Raises:
        ValueError: the processes do not divide into replicas.
    """
    device, world_size = processes.device.type, processes.world_size
    if parallel.sharding == "full":
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    shard_size = parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % shard_size:
        raise ValueError(
            f"parallel.shard_size must divide the number of processes, but {world_size} processes do not divide into"
            f" replicas of {shard_size}"
        )
    return init_device_mesh(device, (world_size // shard_size, shard_size), mesh_dim_names=("replica", "shard"))


def split_network(network: nn.ModuleDict, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Split a backbone and its heads over ``mesh``, block by block.

    Blocks are gathered in ``dtype``. Their products are computed in it anyway, and their norms and LayerScales, whose
    arithmetic stays float32, multiply or make what is rounded to it. Their tokens, the residual stream,
    are not cast. Everything else is gathered in float32, as it enters float32 arithmetic: what the stream starts from,
    the last norm, and the heads, with prototypes that are normalised and a centre that is a mean of logits. Gradients
    are averaged in float32.
    """
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    in_blocks = narrow if dtype != torch.float32 else MixedPrecisionPolicy()
    for module in network.values():
        if isinstance(module, VisionTransformer):
            blocks = [fully_shard(block, mesh=mesh, mp_policy=in_blocks) for block in module.blocks]
            backbone = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(module, "forward_packed")
            _prefetch([backbone, *blocks])
        else:
            prototypes = cast(DINOHead, module).last_layer
            fully_shard(prototypes, mesh=mesh, reshard_after_forward=True)
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(module, "features")
            register_fsdp_forward_method(prototypes, "weight")
            register_fsdp_forward_method(prototypes, "cross_entropy")


def _prefetch(modules: list[FSDPModule]) -> None:
    """Gather each of the modules, in the order of the forward pass, while the one before it runs; backward as well."""
    for module, following in pairwise(modules):
        module.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([module])


def exchange_gradients(network: nn.ModuleDict, exchange: bool) -> None:
    """Whether the next backward pass exchanges gradients, or keeps them for one that does."""
    for module in network.values():
        cast(FSDPModule, module).set_requires_gradient_sync(exchange)


def gathered(state: Any) -> Any:
    """``state`` with whole tensors on the host in place of split ones. All processes must call it."""
    if isinstance(state, DTensor):
        whole: Tensor = state.full_tensor()
        return whole.detach().cpu()
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return state
