"""Parameters, gradients and optimiser state split among the processes (FSDP2: ``torch.distributed.fsdp``).

Each process holds one part of every parameter. A block or head is gathered when it runs and let go afterwards; the
teacher's too, so that none of its gathered weights outlives the update that follows the student.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov2.models import VisionTransformer


def shard_network(network: nn.ModuleDict, group: dist.ProcessGroup, device: torch.device) -> None:
    """Split a backbone and its heads among the processes, block by block; they must hold equal weights."""
    mesh = DeviceMesh.from_group(group, device.type)
    for name, module in network.items():
        parts: Iterable[nn.Module]
        if name == "backbone":
            parts, entrance = cast(VisionTransformer, module).blocks, "forward_features"
        else:
            last_layer = cast(nn.Module, module.last_layer)
            parts, entrance = [last_layer], "features"
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(module, entrance)
        if name != "backbone":
            register_fsdp_forward_method(last_layer, "weight")


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
