"""Soft-target cross-entropy as users call it: argument checks."""

from __future__ import annotations

from torch import Tensor

from dinov2_kernels.cross_entropy import reference


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each student row against ``softmax(teacher_logits / teacher_temperature + teacher_bias)``.

    The loss of DINO and iBOT (arXiv:2104.14294, arXiv:2111.07832); formula in
    :mod:`dinov2_kernels.cross_entropy.reference`. Gradients reach the student alone. The arithmetic is float32 (float64
    for float64 logits), whatever the dtype of the logits and inside autocast too.

    Bytes: in plain PyTorch, about ten passes over [N, K] in float32.

    Args:
        student_logits: [N, K], any floating dtype.
        teacher_logits: [N, K], any floating dtype.
        student_temperature: above 0; 0.1 in DINO.
        teacher_temperature: above 0; 0.04 to 0.07 in DINO.
        teacher_bias: [K], added to the scaled teacher logits: -center / teacher_temperature for softmax centring, the
            result of :func:`sinkhorn_bias` for Sinkhorn-Knopp; None for none.
        row_weight: [N], factor on each row's loss; None for 1.

    Returns:
        [N], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {logits.dtype}")
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise ValueError(f"{name}: expected shape [N, K] with K >= 1, got {list(logits.shape)}")
    N, K = student_logits.shape
    _check_shape("teacher_logits", teacher_logits, (N, K))
    _check_shape("teacher_bias", teacher_bias, (K,))
    _check_shape("row_weight", row_weight, (N,))
    for name, temperature in (
        ("student_temperature", student_temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if not temperature > 0:
            raise ValueError(f"{name}: expected a number above 0, got {temperature}")
    return reference.soft_cross_entropy(
        student_logits, teacher_logits, student_temperature, teacher_temperature, teacher_bias, row_weight
    )


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{name}: expected shape {list(expected)} to match student_logits, got {list(tensor.shape)}")
