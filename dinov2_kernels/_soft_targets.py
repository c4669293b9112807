"""Argument checks that both losses against soft targets share.

``beside`` is the name and the tensor of the N student rows; other arguments are compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dinov2_kernels._library import contiguous
from dinov2_kernels._numbers import check_above_0

Beside = tuple[str, Tensor]


Shape = tuple[int | str, ...]


def check_tensor(name: str, tensor: Tensor, has_shape: bool, shape: Shape, note: str, beside: Beside) -> None:
    """Raise TypeError or ValueError unless the tensor is floating and passes :func:`check_shape`."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    check_shape(name, tensor, has_shape, shape, note, beside)


def check_shape(name: str, tensor: Tensor, has_shape: bool, shape: Shape, note: str, beside: Beside) -> None:
    """Raise ValueError unless the tensor has its shape (``shape`` and ``note`` describe it) and ``beside``'s device."""
    if not has_shape:
        sizes = ", ".join(map(str, shape))  # only for the message: formatting takes longer than the check
        raise ValueError(f"{name}: expected shape [{sizes}] {note}, got {list(tensor.shape)}")
    _check_device(name, tensor, beside)


def checked_targets(
    *,
    beside: Beside,
    M: int,
    K: int,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    teacher_index: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor | None:
    """Check the arguments that describe the targets: bias, weights, index and temperatures.

    The teacher logits are [M, K].

    Returns:
        ``teacher_index`` as operators take it, int64 [N, J], or None.

    Raises:
        TypeError, ValueError: an argument is not as described; values of tensors are checked on a CPU only.
    """
    N = beside[1].shape[0]
    if teacher_bias is not None:
        check_shape("teacher_bias", teacher_bias, teacher_bias.shape == (K,), (K,), "to match teacher_logits", beside)
    if row_weight is not None:
        check_shape("row_weight", row_weight, row_weight.shape == (N,), (N,), "for the rows of students", beside)
        if _values_are_known(row_weight) and row_weight.isnan().any():
            raise ValueError(f"row_weight: expected numbers, got NaN in row {int(row_weight.isnan().nonzero()[0, 0])}")
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        check_above_0(name, temperature)
    return None if teacher_index is None else _checked_index(teacher_index, M, beside)


def _checked_index(index: Tensor, M: int, beside: Beside) -> Tensor:
    """``teacher_index`` [N] or [N, J] as operators take it: int64 [N, J], with rows of the M teachers."""
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"teacher_index: expected integers, got {index.dtype}")
    N = beside[1].shape[0]
    if index.dim() not in (1, 2) or index.shape[0] != N or index.shape[-1] == 0 < N:
        raise ValueError(f"teacher_index: expected shape [{N}] or [{N}, J] with J >= 1, got {list(index.shape)}")
    _check_device("teacher_index", index, beside)
    if index.numel() and _values_are_known(index):
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= M:
            raise ValueError(f"teacher_index: expected rows from 0 to {M - 1}, got {low if low < 0 else high}")
    return contiguous(index.long().reshape(N, -1 if N else 1))


def _check_device(name: str, tensor: Tensor, beside: Beside) -> None:
    if tensor.device != beside[1].device:
        raise ValueError(f"{name}: expected the device of {beside[0]}, {beside[1].device}, got {tensor.device}")


def _values_are_known(x: Tensor) -> bool:
    """Whether the tensor has values, and reading them neither waits for a GPU nor splits a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)
