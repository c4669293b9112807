"""Arithmetic of a run: float32, or autocast to bfloat16 or float16 around float32 weights.

float16 holds no number below 6e-8, so the loss is multiplied by a scale before the backward pass. The scale grows until
gradients overflow and then shrinks (:class:`torch.amp.GradScaler`). A step whose gradients overflow changes nothing.

Under autocast, linear layers cast their float32 weights at every use: 8 launches for each block of the student, 8 for
each block of the teacher, and 8 for the gradients. On a GPU, 16-bit copies replace the weights while a micro-batch
runs. One call per step casts the weights of all networks, and one call per block casts the gradients. The values are
bitwise those of autocast. Only parameters of ``nn.Linear`` have copies. Autocast casts only one other parameter, the
patch embedding's, and adds up its gradient in float32 over the sizes of crops. Prototypes are normalised before they
are cast.
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
from dinov2_kernels._autograd import KernelFunction, differentiably, needs_gradient

Config = TypeVar("Config", bound=RunConfig)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settle_precision(config: RunConfig, device: torch.device) -> RunConfig:
    """``config`` with a definite precision in place of "auto".

    A resumed run keeps the precision of its start, on any device. A new run takes the precision that suits the device.
    """
    if config.precision != "auto":
        return config
    config_file = config.output / "config.json"
    saved = json.loads(config_file.read_text()).get("precision") if config_file.is_file() else None
    return replace(config, precision=saved) if saved else with_definite_precision(config, device)


def with_definite_precision(config: Config, device: torch.device) -> Config:
    """``config`` with the precision that it means on a device.

    Raises:
        ValueError: another field does not allow this precision.
    """
    return replace(config, precision=definite(config.precision, device))


def definite(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The precision that "auto" means on a device; any other precision is returned unchanged."""
    if precision == "auto":
        return "fp32" if device.type in ("cpu", "meta") else "bf16"
    return precision


class Arithmetic:
    """Autocast and the loss scale of a trainer on ``device``. Only :meth:`metrics` waits for the device.

    Attributes:
        dtype: dtype of matrix products and attention.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.device = device
        self.dtype = DTYPES[definite(precision, device)]
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype == torch.float16 else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context manager of every forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the scaled gradient of ``loss`` to the gradients."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, after the last micro-batch."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step a fused optimiser. It checks on the device whether gradients overflowed, and then changes nothing."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def metrics(self) -> dict[str, float]:
        """The loss scale, if losses are scaled; waits for the device."""
        return {} if self.scaler is None else {"loss_scale": self.scaler.get_scale()}

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and its progress towards the next growth; empty if losses are not scaled."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state)


def keeps_weight_copies(config: RunConfig, device_type: str, *, is_split: bool) -> bool:
    """Whether a run keeps 16-bit copies of its weights: in low precision, on a GPU.

    A CPU has no kernel launches to save, and the copies would raise its peak memory. If networks are split among
    processes, FSDP casts the weights that it gathers. A compiled block has the casts in its own graph.

    Args:
        config: the run.
        device_type: type of the device that trains, such as "cuda".
        is_split: whether the networks are split among the processes.
    """
    dtype = DTYPES[definite(config.precision, torch.device(device_type))]
    return device_type != "cpu" and dtype != torch.float32 and not is_split and not config.compile


def copied_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters that have copies, each with its module and its name in the module."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            for name, parameter in layer.named_parameters(recurse=False):
                yield layer, name, parameter


@dataclass(frozen=True)
class _Place:
    """A weight's attribute in its module, and the copy of the weight."""

    parameters: dict[str, Any]
    name: str
    copy: Tensor

    def now(self) -> Tensor:
        """The tensor that the module uses now: the weight or its copy."""
        return cast(Tensor, self.parameters[self.name])

    def put(self, tensor: Tensor) -> None:
        """Let the module use this tensor."""
        self.parameters[self.name] = tensor


class WeightCopies:
    """Copies of the linear layers' weights in some networks. Without networks it does nothing.

    Args:
        networks: networks on their device, each with a backbone and heads.
        dtype: dtype of the copies.
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
        """Copy the current weights. Do not call it between a forward pass and its backward pass."""
        if self._groups:
            torch._foreach_copy_(self.tensors, [place.now() for group in self._groups for place in group])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules use the copies instead of their weights; gradients go to the weights.

        Run both passes of a micro-batch in this context, because blocks with activation checkpointing read their
        weights in the backward pass, too.
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


class _StandIn(KernelFunction):
    """Returns the copies, and passes their gradients on to the weights. Arguments: the copies, then the weights."""

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
    """Blocks and heads. Each casts its gradients in one call: few launches, and early enough for their all-reduce."""
    for module in network.values():
        yield from module.blocks if isinstance(module, VisionTransformer) else [module]


def _places(module: nn.Module, dtype: torch.dtype) -> list[_Place]:
    return [
        _Place(layer._parameters, name, parameter.detach().to(dtype))
        for layer, name, parameter in copied_parameters(module)
    ]
