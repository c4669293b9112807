"""Parameters, gradients and optimiser state split among the processes (FSDP2: ``torch.distributed.fsdp``).

Each process holds one shard of every parameter. A block or head is gathered when it runs, and its gathered weights
are freed afterwards. This holds for the EMA teacher too, so no gathered weight is older than the teacher's last update.
While a block runs, the next one is gathered.

Process 0 builds whole networks in host memory, as a single process does. The others build them without memory, on the
meta device, and get their shards from process 0. No GPU ever holds a whole network.
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
    """Build an objective in process 0 and split its networks among the processes.

    Args:
        build: makes the objective on PyTorch's current default device.
        parallel: how the networks are split.
        processes: the processes of the run.
        dtype: dtype in which blocks are gathered.
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
    """The mesh of processes, [shard] or [replica, shard]: replicas hold equal weights, shards hold parts of them.

    Raises:
        ValueError: the processes do not divide into replicas.
    """
    device, world_size = processes.device.type, processes.world_size
    if parallel.sharding == "full":
        return init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    shard_size = parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % shard_size:
        raise ValueError(
            f"parallel.shard_size: expected a divisor of the number of processes, {world_size}, got replicas of"
            f" {shard_size}"
        )
    return init_device_mesh(device, (world_size // shard_size, shard_size), mesh_dim_names=("replica", "shard"))


def split_network(network: nn.ModuleDict, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Split a backbone and its heads over ``mesh``, block by block.

    Blocks are gathered in ``dtype``. Their matrix products are computed in it anyway. Their norms and LayerScales
    compute in float32, but what they make or multiply is rounded to ``dtype``. The residual stream is not cast.
    Everything else is gathered in float32, because it enters float32 arithmetic: the embeddings, the last norm and the
    heads, whose prototypes are normalised and whose centre is a mean of logits. Gradients are averaged in float32.
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
    """Gather each module while the one before it runs, in the forward and in the backward pass.

    The modules are in the order of the forward pass.
    """
    for module, following in pairwise(modules):
        module.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([module])


def exchange_gradients(network: nn.ModuleDict, exchange: bool) -> None:
    """Set whether the next backward pass exchanges gradients, or only adds them up for a later one."""
    for module in network.values():
        cast(FSDPModule, module).set_requires_gradient_sync(exchange)


def gathered(state: Any) -> Any:
    """``state`` in which split tensors are replaced by whole ones on the host. All processes must call it."""
    if isinstance(state, DTensor):
        whole: Tensor = state.full_tensor()
        return whole.detach().cpu()
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    return state
