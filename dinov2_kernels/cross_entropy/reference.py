"""Soft-target cross-entropy in plain PyTorch: the definition every kernel is tested against.

With teacher logits t [M, K], their temperature and a bias b [K], and student logits s [N, K], where student row n
learns the targets of teacher rows index_n1, ..., index_nJ,

    q_m = softmax(t_m / T_teacher + b)                          (the targets; no gradient)
    loss_n = -w_n sum_j sum_k q_(index_nj)k log_softmax(s_n / T_student)_k

Both centrings of DINO are such a bias: b = -center / T_teacher (arXiv:2104.14294), or b = log u from Sinkhorn-Knopp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype


@torch.no_grad()
def soft_targets(logits: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
    """softmax(logits / T + bias) over the last dimension, without gradient, [..., K]."""
    scaled = logits.to(accumulation_dtype(logits)) / temperature
    return torch.softmax(scaled if bias is None else scaled + bias, dim=-1)


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], and norms of students [N, 2] and teachers [M, 2].

    A norm is the maximum of a row, of s for a student and of t / T + b for a teacher, and the sum of exponentials
    relative to it. They are two numbers and not one log-sum-exp: at 1e5 its rounding alone would change the softmax
    by 1 %.
    """
    targets = _targets(teacher, index, bias, teacher_temperature)  # [N, K]
    scaled = student.to(accumulation_dtype(student)) / student_temperature
    loss = -(targets * torch.log_softmax(scaled, dim=-1)).sum(dim=-1)
    student_max = student.amax(dim=1, keepdim=True).to(scaled.dtype)  # [N, 1]
    student_sum = torch.exp(scaled - student_max / student_temperature).sum(dim=1, keepdim=True)
    z = teacher.to(accumulation_dtype(teacher)) / teacher_temperature
    z = z if bias is None else z + bias
    teacher_max = z.amax(dim=1, keepdim=True)  # [M, 1]
    teacher_sum = torch.exp(z - teacher_max).sum(dim=1, keepdim=True)
    norms = torch.cat([student_max, student_sum], dim=1), torch.cat([teacher_max, teacher_sum], dim=1)
    return loss if weight is None else loss * weight, *norms


def soft_cross_entropy_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    student_norm: Tensor,
    teacher_norm: Tensor,
) -> Tensor:
    """Gradient [N, K] of the student logits from grad [N]: grad_n w_n / T_student (J softmax(s_n / T) - sum_j q_j)."""
    targets = _targets(teacher, index, bias, teacher_temperature)  # [N, K]
    probabilities = torch.softmax(student.to(accumulation_dtype(student)) / student_temperature, dim=-1)
    faced = 1 if index is None else index.shape[1]
    factor = (grad if weight is None else grad * weight) / student_temperature  # [N]
    return (factor[:, None] * (faced * probabilities - targets)).to(student.dtype)


def soft_cross_entropy_backward_(student: Tensor, grad: Tensor, teacher: Tensor, *args: Tensor) -> None:
    """:func:`soft_cross_entropy_backward`, written over the student logits."""
    student.copy_(soft_cross_entropy_backward(grad, student, teacher, *args))  # type: ignore[arg-type]


def _targets(teacher: Tensor, index: Tensor | None, bias: Tensor | None, temperature: float) -> Tensor:
    """sum_j q_(index_nj) [N, K]."""
    targets = soft_targets(teacher, temperature, bias)  # [M, K]
    return targets if index is None else targets[index].sum(dim=1)
