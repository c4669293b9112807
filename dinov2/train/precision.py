"""Arithmetic of a run: float32, or autocast to bfloat16 or float16 around float32 weights.

float16 holds no number below 6e-8, so gradients are those of the loss times a scale, which grows until they overflow
and then shrinks (:class:`torch.amp.GradScaler`). A step whose gradients overflowed changes nothing.

Under autocast, linear layers cast their float32 weights at every use: 8 launches for each block of the student, 8 for
the teacher's, and 8 for the gradients. On a GPU, 16-bit copies take the weights' place while a micro-batch runs. They
are cast by one call for all networks of a step, and the gradients of a block by another. Values are those of autocast,
to the bit. Only parameters of ``nn.Linear`` have copies. Autocast casts no other parameter but the patch embedding's,
whose gradient it adds up in float32 over the sizes of crops; prototypes are normalised before they are cast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2.models import VisionTransformer
from dinov2.train.config import Precision, RunConfig
from dinov2_kernels._library import differentiably, needs_gradient

Config = TypeVar("Config", bound=RunConfig)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settle_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """``config`` with a definite precision in place of "auto".

    A run keeps the precision that it was started with, wherever it is continued; a new one takes what suits the device.
    """
    if config.precision != "auto":
        return config
    config_file = config.output / "config.json"
    saved = json.loads(config_file.read_text()).get("precision") if config_file.is_file() else None
    return replace(config, precision=saved) if saved else with_definite_precision(config, device)


def with_definite_precision(config: Config, device: torch.device) -> Config:
    """``config`` with what its precision means on a device.

    Raises:
        ValueError: another field does not go with it.
    """
    return replace(config, precision=definite(config.precision, device))


def definite(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What "auto" means on a device; any other precision as it is."""
    if precision == "auto":
        return "fp32" if device.type in ("cpu", "meta") else "bf16"
    return precision


class Arithmetic:
    """How a trainer computes on ``device``: autocast, and the scale of the loss; nothing here waits for the device.

    Attributes:
        dtype: of matrix products and attention.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.device = device
        self.dtype = DTYPES[definite(precision, device)]
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, scaled."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the scale of the gradients, once all of them have arrived."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step of a fused optimiser, which looks on the device whether gradients overflowed and then does nothing."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def metrics(self) -> dict[str, float]:
        """What there is to log; waits for the device."""
        return {} if self.scaler is None else {"loss_scale": self.scaler.get_scale()}

    def state_dict(self) -> dict[str, Any]:
        """The scale and when it grows next; empty where losses are not scaled."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state)


def keeps_weight_copies(config: RunConfig, device_type: str, *, is_split: bool) -> bool:
    """Whether a run keeps copies: in low precision, on a GPU.

    A CPU has no launches to save, and the copies would lie in its memory where a step needs most of it. Where networks
    are split among processes, FSDP casts what it gathers; and the graph of a compiled block holds casts.

    Args:
        config: the run.
        device_type: where it trains.
        is_split: whether its networks are split among the processes.
    """
    dtype = DTYPES[definite(config.precision, torch.device(device_type))]
    return device_type != "cpu" and dtype != torch.float32 and not is_split and not config.compile


def copied_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that have copies, each with the module that holds it and its name there."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            for name, parameter in layer.named_parameters(recurse=False):
                yield layer, name, parameter


@dataclass(frozen=True)
class _Place:
    """Where a module looks a weight up, and the copy of that weight."""

    parameters: dict[str, Any]
    name: str
    copy: Tensor

    def now(self) -> Tensor:
        """The weight, or what stands in its place."""
        return cast(Tensor, self.parameters[self.name])

    def put(self, tensor: Tensor) -> None:
        """Let the module find this tensor."""
        self.parameters[self.name] = tensor


class WeightCopies:
    """Copies of the linear layers' weights in some networks. Without networks it does nothing.

    Args:
        networks: each with a backbone and heads, on their device.
        dtype: of the copies.
    """

    def __init__(self, networks: Iterable[nn.ModuleDict], dtype: torch.dtype) -> None:
        groups = [_places(module, dtype) for network in networks for module in _modules(network)]
        self._groups = [group for group in groups if group]

    @property
    def tensors(self) -> list[Tensor]:
        """All copies."""
        return [place.copy for group in self._groups for place in group]

    @torch.no_grad()
    def renew(self) -> None:
        """Round the weights as they are now; a forward pass before it can have no backward pass after it."""
        if self._groups:
            torch._foreach_copy_(self.tensors, [place.now() for group in self._groups for place in group])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules find copies where their weights are; gradients go to the weights.

        Both passes of a micro-batch belong in here: blocks that compute their activations again look their weights up
        in the backward pass.
        """
        weights = [[place.now() for place in group] for group in self._groups]
        try:
            for group, originals in zip(self._groups, weights, strict=True):
                copies = [place.copy for place in group]
                if needs_gradient(*originals):
                    copies = differentiably(_StandIn, *copies, *originals)
                for place, copy in zip(group, copies, strict=True):
                    place.put(copy)
            yield
        finally:
            for group, originals in zip(self._groups, weights, strict=True):
                for place, weight in zip(group, originals, strict=True):
                    place.put(weight)


class _StandIn(torch.autograd.Function):
    """Copies of some weights, with the gradients of these weights; arguments: the copies, then the weights."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        copies, weights = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        widened = [torch.empty_like(grad, dtype=ctx.dtype) for grad in there]
        if there:
            torch._foreach_copy_(widened, there)
        remaining = iter(widened)
        return (*[None] * len(grads), *(None if grad is None else next(remaining) for grad in grads))


def _modules(network: nn.ModuleDict) -> Iterator[nn.Module]:
    """Blocks and heads. Each casts its gradients together: few launches, and soon enough to be exchanged meanwhile."""
    for module in network.values():
        yield from module.blocks if isinstance(module, VisionTransformer) else [module]


def _places(module: nn.Module, dtype: torch.dtype) -> list[_Place]:
    return [
        _Place(layer._parameters, name, parameter.detach().to(dtype))
        for layer, name, parameter in copied_parameters(module)
    ]
