"""Soft-target cross-entropy in plain PyTorch: the definition every kernel is tested against.

With teacher logits t [N, K], their temperature and a bias b [K], and student logits s [N, K],

    q = softmax(t / T_teacher + b)                              (the target; no gradient)
    loss_n = -w_n sum_k q_nk log_softmax(s_n / T_student)_k

Both centrings of DINO are such a bias: b = -center / T_teacher (arXiv:2104.14294), or b = log u after Sinkhorn-Knopp.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float64 for float64, float32 otherwise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def soft_targets(logits: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
    """softmax(logits / T + bias) over the last dimension, without gradient, [..., K]."""
    scaled = widened(logits) / temperature
    return torch.softmax(scaled if bias is None else scaled + bias, dim=-1)


def cross_entropy(student_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-sum_k q_k log_softmax(s / T)_k over the last dimension; logits and targets [..., K] broadcast."""
    log_probabilities = torch.log_softmax(widened(student_logits) / temperature, dim=-1)
    return -(targets * log_probabilities).sum(dim=-1)


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Loss of each row [N]."""
    targets = soft_targets(teacher_logits, teacher_temperature, teacher_bias)
    loss = cross_entropy(student_logits, targets, student_temperature)
    return loss if row_weight is None else loss * row_weight
