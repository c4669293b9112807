"""What both losses against soft targets demand of the arguments that they share.

``beside`` is the tensor that others are compared with: its name and itself, of N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Beside = tuple[str, Tensor]


def check_device(name: str, tensor: Tensor, beside: Beside) -> None:
    """Raise ValueError unless the tensor lies where the other one does."""
    if tensor.device != beside[1].device:
        raise ValueError(f"{name}: expected the device of {beside[0]}, {beside[1].device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], beside: Beside) -> None:
    """Raise ValueError unless the tensor has this shape and lies where the other one does."""
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {list(expected)} to match {beside[0]}, got {list(tensor.shape)}")
    check_device(name, tensor, beside)


def check_numbers(weight: Tensor) -> None:
    """Raise ValueError if ``row_weight`` [N] holds a NaN; looked at on a CPU only."""
    if _values_are_known(weight) and weight.isnan().any():
        raise ValueError(f"row_weight: expected numbers, got NaN in row {int(weight.isnan().nonzero()[0, 0])}")


def check_temperatures(student_temperature: float, teacher_temperature: float) -> None:
    """Raise ValueError unless both are above 0."""
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not temperature > 0:
            raise ValueError(f"{name}: expected a number above 0, got {temperature}")


def checked_index(index: Tensor, M: int, beside: Beside) -> Tensor:
    """``teacher_index`` [N] or [N, J] as operators take it: int64 [N, J], with rows of the M teachers.

    Raises:
        TypeError, ValueError: it is none; values are looked at on a CPU only.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"teacher_index: expected integers, got {index.dtype}")
    N = beside[1].shape[0]
    if index.dim() not in (1, 2) or index.shape[0] != N or index.shape[-1] == 0 < N:
        raise ValueError(f"teacher_index: expected shape [{N}] or [{N}, J] with J >= 1, got {list(index.shape)}")
    check_device("teacher_index", index, beside)
    if index.numel() and _values_are_known(index):
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= M:
            raise ValueError(f"teacher_index: expected rows from 0 to {M - 1}, got {low if low < 0 else high}")
    return index.long().reshape(N, -1 if N else 1).contiguous()


def _values_are_known(x: Tensor) -> bool:
    """Whether there are values, and looking at them waits for no GPU and splits no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)
