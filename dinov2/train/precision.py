"""Arithmetic of a run: float32, or autocast to bfloat16 or float16 around float32 weights.

float16 holds no number below 6e-8, so gradients are those of the loss times a scale, which grows until they overflow
and then shrinks (:class:`torch.amp.GradScaler`). A step whose gradients overflowed changes nothing.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dinov2.train.config import Precision, RunConfig

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
