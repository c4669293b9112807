"""Soft-target cross-entropy: forward and backward operators, autograd, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._autograd import (
    KernelFunction,
    differentiably,
    in_pytorch,
    is_beyond_kernels,
    is_of_a_leaf,
    needs_gradient,
    refuse_beyond_kernels,
)
from dinov2_kernels._library import accumulation_dtype, contiguous, define
from dinov2_kernels._soft_targets import check_tensor, checked_targets
from dinov2_kernels.cross_entropy import reference

_TRITON = "dinov2_kernels.cross_entropy.triton_kernel"


def _fake_forward(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    N, M, dtype = student.shape[0], teacher.shape[0], accumulation_dtype(student)
    norms = student.new_empty(N, 2, dtype=dtype), student.new_empty(M, 2, dtype=dtype)
    return student.new_empty(N, dtype=dtype), *norms


def _fake_backward(grad: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _fake_backward_(student: Tensor, *_: Any) -> None:
    return None


# All are contiguous: student [N, K], teacher [M, K], index [N, J] int64; bias [K], weight and grad [N] in the
# accumulation dtype.
_forward = define(
    "soft_cross_entropy(Tensor student, Tensor teacher, Tensor? index, Tensor? bias, Tensor? weight, "
    "float student_temperature, float teacher_temperature) -> (Tensor, Tensor, Tensor)",
    reference=reference.soft_cross_entropy,
    fake=_fake_forward,
    triton=f"{_TRITON}:soft_cross_entropy",
).call
_backward = define(
    "soft_cross_entropy_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? index, Tensor? bias, "
    "Tensor? weight, float student_temperature, float teacher_temperature, Tensor student_norm, Tensor teacher_norm) "
    "-> Tensor",
    reference=reference.soft_cross_entropy_backward,
    fake=_fake_backward,
    triton=f"{_TRITON}:soft_cross_entropy_backward",
).call
_backward_ = define(
    "soft_cross_entropy_backward_(Tensor(a!) student, Tensor grad, Tensor teacher, Tensor? index, Tensor? bias, "
    "Tensor? weight, float student_temperature, float teacher_temperature, Tensor student_norm, Tensor teacher_norm) "
    "-> ()",
    reference=reference.soft_cross_entropy_backward_,
    fake=_fake_backward_,
    triton=f"{_TRITON}:soft_cross_entropy_backward_",
).call


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_index: Tensor | None = None,
    overwrite_student_logits: bool = False,
) -> Tensor:
    """Cross-entropy of each student row against ``softmax(teacher_logits / teacher_temperature + teacher_bias)``.

    This is the loss of DINO and iBOT (arXiv:2104.14294, arXiv:2111.07832); the formula is in
    :mod:`dinov2_kernels.cross_entropy.reference`. The targets are never stored, and only the student gets a gradient.
    The arithmetic is float32 (float64 for float64 logits) for every dtype of the logits, and under autocast too.
    Results are the same in every run and for every number of threads.

    Bytes, with s per student logit and t per teacher logit: forward reads the student logits, N K s, and the teacher
    logits, M K t. One read of the teacher serves up to 8 students (on a GPU: all students that find it in L2). Backward
    reads the same and writes N K s. Backward needs 8 more bytes per row, which forward keeps.

    Args:
        student_logits: [N, K], float64, float32, bfloat16 or float16.
        teacher_logits: [M, K] in any of these dtypes; float64 if and only if student_logits are float64.
        student_temperature: above 0; 0.1 in DINO.
        teacher_temperature: above 0; 0.04 to 0.07 in DINO.
        teacher_bias: [K], added to the scaled teacher logits: -center / teacher_temperature for softmax centring, the
            result of :func:`sinkhorn_bias` for Sinkhorn-Knopp; None for no bias.
        row_weight: [N], factor on each row's loss; None for 1. NaN raises an error on a CPU; on other devices it
            makes that row's loss NaN.
        teacher_index: [N] or [N, J] integers: the teacher rows whose targets a student row learns. The J losses of a
            row are added. None pairs student row n with teacher row n. The values are checked on a CPU only: on other
            devices the check would wait for the device.
        overwrite_student_logits: backward writes the gradient over the student logits and allocates nothing. The
            logits must come from a layer that does not need them for its own backward (a linear layer does not), not
            from a leaf. A second backward raises autograd's error. Under ``torch.compile`` nothing is overwritten,
            because a compiled backward pass has no such error.

    Returns:
        [N], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> student, teacher = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
        >>> loss = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.04)
        >>> loss.shape
        torch.Size([4])
        >>> loss.mean().backward()
        >>> student.grad.shape
        torch.Size([4, 8])
        >>> index = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])  # each student row has two teacher rows
        >>> temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
        >>> soft_cross_entropy(student, teacher[:2], teacher_index=index, **temperatures).shape
        torch.Size([4])
    """
    beside, shape = ("student_logits", student_logits), student_logits.shape
    check_tensor("student_logits", student_logits, len(shape) == 2 and shape[1] > 0, ("N", "K"), "with K >= 1", beside)
    N, K = shape
    is_teacher = teacher_logits.dim() == 2 and teacher_logits.shape[1] == K
    is_teacher = is_teacher and (teacher_index is not None or teacher_logits.shape[0] == N)
    rows = N if teacher_index is None else "M"
    check_tensor("teacher_logits", teacher_logits, is_teacher, (rows, K), "to match student_logits", beside)
    M = teacher_logits.shape[0]
    dtype = accumulation_dtype(student_logits)
    if accumulation_dtype(teacher_logits) != dtype:
        raise TypeError(
            f"teacher_logits: expected float64 if and only if student_logits are, got {teacher_logits.dtype}"
        )
    index = checked_targets(
        beside=beside,
        M=M,
        K=K,
        teacher_bias=teacher_bias,
        row_weight=row_weight,
        teacher_index=teacher_index,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    if overwrite_student_logits and not student_logits.is_contiguous():
        raise ValueError("overwrite_student_logits: expected contiguous student_logits")
    if overwrite_student_logits and is_of_a_leaf(student_logits):
        raise ValueError("overwrite_student_logits: expected logits of a layer, got a leaf that requires a gradient")
    student, teacher = contiguous(student_logits), contiguous(teacher_logits.detach())
    bias, weight = _constant(teacher_bias, dtype), _constant(row_weight, dtype)
    arguments = (student, teacher, index, bias, weight, student_temperature, teacher_temperature)
    if needs_gradient(student):
        return differentiably(_SoftCrossEntropy, *arguments, overwrite_student_logits)  # type: ignore[no-any-return]
    loss: Tensor = _forward(*arguments)[0]
    return loss


class _SoftCrossEntropy(KernelFunction):
    @staticmethod
    def definition(*args: Any) -> Tensor:
        *arguments, _ = args
        return reference.soft_cross_entropy(*arguments)[0]

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        index: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        student_temperature: float,
        teacher_temperature: float,
        overwrite: bool,
    ) -> Tensor:
        temperatures = (student_temperature, teacher_temperature)
        loss: Tensor
        loss, *norms = _forward(student, teacher, index, bias, weight, *temperatures)
        ctx.save_for_backward(student, teacher, index, bias, weight, *norms)
        ctx.temperatures, ctx.overwrite = temperatures, overwrite
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, *others = ctx.saved_tensors
        teacher, index, bias, weight, *norms = others
        constants = (teacher, index, bias, weight, *ctx.temperatures, *norms)
        if is_beyond_kernels(grad):
            if ctx.overwrite:
                refuse_beyond_kernels("soft_cross_entropy", "overwrite_student_logits=False")
            gradient = in_pytorch(reference.soft_cross_entropy_backward, grad, student, *constants)
        elif ctx.overwrite and not torch.compiler.is_compiling():
            gradient = student.detach()
            _backward_(gradient, grad.contiguous(), *constants)
            torch.autograd.graph.increment_version(student)  # makes autograd notice a second backward
        else:
            gradient = _backward(grad.contiguous(), student, *constants)
        return gradient, *(None,) * 7


def _constant(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else contiguous(tensor.detach().to(dtype))
