"""What :func:`prototype_cross_entropy` demands of its arguments."""

from __future__ import annotations

from torch import Tensor

from dinov2_kernels._soft_targets import check_device, check_numbers, check_temperatures, checked_index


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
) -> Tensor | None:
    """Raise TypeError or ValueError that names the first argument which is not as described.

    Returns:
        The index as operators take it, int64 [N, J].
    """
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
        check_numbers(row_weight)
    if weight_gain is not None:
        is_gain = weight_gain.shape in ((K,), (K, 1))
        _check_tensor("weight_gain", weight_gain, features, is_gain, f"[{K}] or [{K}, 1] to match weight")
    check_temperatures(student_temperature, teacher_temperature)
    if teacher_index is not None:
        return checked_index(teacher_index, M, ("features", features))
    if M != N:
        raise ValueError(f"teacher_logits: without teacher_index expected a row for each of features, {N}, got {M}")
    return None


def _check_tensor(name: str, tensor: Tensor, features: Tensor, has_shape: bool, shape: str) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if not has_shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
    check_device(name, tensor, ("features", features))
