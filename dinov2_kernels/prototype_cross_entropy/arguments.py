"""What :func:`prototype_cross_entropy` demands of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def check(
    *,
    features: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    teacher_bias: Tensor | None,
    row_weight: Tensor | None,
    teacher_index: Tensor | None,
    weight_gain: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """Raise TypeError or ValueError that names the first argument which is not as described."""
    _check_tensor("features", features, features, features.dim() == 2 and features.shape[1] > 0, "[N, D] with D >= 1")
    N, D = features.shape
    is_weight = weight.dim() == 2 and weight.shape[1] == D and weight.shape[0] > 0
    _check_tensor("weight", weight, features, is_weight, f"[K, {D}] with K >= 1 to match features")
    K = weight.shape[0]
    is_teacher = teacher_logits.dim() == 2 and teacher_logits.shape[1] == K
    _check_tensor("teacher_logits", teacher_logits, features, is_teacher, f"[M, {K}] to match weight")
    M = teacher_logits.shape[0]
    if teacher_bias is not None:
        _check_tensor("teacher_bias", teacher_bias, features, teacher_bias.shape == (K,), f"[{K}] to match weight")
    if row_weight is not None:
        _check_tensor("row_weight", row_weight, features, row_weight.shape == (N,), f"[{N}] to match features")
        if _values_are_known(row_weight) and row_weight.isnan().any():
            raise ValueError(f"row_weight: expected numbers, got NaN in row {int(row_weight.isnan().nonzero()[0])}")
    if weight_gain is not None:
        is_gain = weight_gain.shape in ((K,), (K, 1))
        _check_tensor("weight_gain", weight_gain, features, is_gain, f"[{K}] or [{K}, 1] to match weight")
    if teacher_index is not None:
        _check_index(teacher_index, features, N, M)
    elif M != N:
        raise ValueError(f"teacher_logits: without teacher_index expected a row for each of features, {N}, got {M}")
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not temperature > 0:
            raise ValueError(f"{name}: expected a number above 0, got {temperature}")


def _check_tensor(name: str, tensor: Tensor, features: Tensor, has_shape: bool, shape: str) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if not has_shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
    _check_device(name, tensor, features)


def _check_device(name: str, tensor: Tensor, features: Tensor) -> None:
    if tensor.device != features.device:
        raise ValueError(f"{name}: expected the device of features, {features.device}, got {tensor.device}")


def _check_index(index: Tensor, features: Tensor, N: int, M: int) -> None:
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"teacher_index: expected integers, got {index.dtype}")
    if index.dim() not in (1, 2) or index.shape[0] != N or (N > 0 and index.shape[-1] == 0):
        raise ValueError(f"teacher_index: expected shape [{N}] or [{N}, J] with J >= 1, got {list(index.shape)}")
    _check_device("teacher_index", index, features)
    if index.numel() > 0 and _values_are_known(index) and not 0 <= int(index.min()) <= int(index.max()) < M:
        wrong = index[(index < 0) | (index >= M)]
        raise ValueError(f"teacher_index: expected rows of teacher_logits, 0 to {M - 1}, got {int(wrong[0])}")


def _values_are_known(x: Tensor) -> bool:
    """Whether looking at values waits for no GPU and splits no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
