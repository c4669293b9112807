"""Cross-entropy of prototypes: forward and backward operators, autograd, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._autograd import (
    KernelFunction,
    differentiably,
    gradients_of_definition,
    is_beyond_kernels,
    needs_gradient,
)
from dinov2_kernels._library import accumulation_dtype, autocast_dtype, contiguous, define, dense
from dinov2_kernels._soft_targets import check_tensor, checked_targets
from dinov2_kernels.prototype_cross_entropy import chunked, reference


def _fake_forward(
    features: Tensor,
    weight: Tensor,
    weight_gain: Tensor | None,
    teacher_logits: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    N, M, dtype = features.shape[0], teacher_logits.shape[0], accumulation_dtype(features)
    return tuple(features.new_empty(shape, dtype=dtype) for shape in ((N,), (4, N), (2, M)))  # type: ignore[return-value]


def _fake_backward(
    grad: Tensor, features: Tensor, weight: Tensor, weight_gain: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    features_wanted, weight_wanted = rest[-1]
    return (
        torch.empty_like(features) if features_wanted else features.new_empty(0),
        torch.empty_like(weight) if weight_wanted else weight.new_empty(0),
        weight.new_empty(0) if weight_gain is None or not weight_wanted else torch.empty_like(weight_gain),
    )


_ARGUMENTS = (
    "Tensor features, Tensor weight, Tensor? weight_gain, Tensor teacher_logits, Tensor teacher_bias, "
    "Tensor? teacher_index, Tensor? row_weight"
)
_forward = define(
    f"prototype_cross_entropy({_ARGUMENTS}, float student_temperature, float teacher_temperature, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.prototype_cross_entropy,
    composite=chunked.prototype_cross_entropy,
    fake=_fake_forward,
).call
_backward = define(
    f"prototype_cross_entropy_backward(Tensor grad, {_ARGUMENTS}, Tensor state, Tensor norm, "
    "float student_temperature, float teacher_temperature, ScalarType dtype, bool[2] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.prototype_cross_entropy_backward,
    composite=chunked.prototype_cross_entropy_backward,
    fake=_fake_backward,
).call


def prototype_cross_entropy(
    features: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    teacher_bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    teacher_index: Tensor | None = None,
    weight_gain: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``softmax(features @ prototypes.T / student_temperature)`` against the targets of a teacher.

    This is the last layer of a DINO or iBOT head together with its loss (arXiv:2104.14294, arXiv:2111.07832). It never
    stores the student logits [N, K], their gradient, or the targets
    ``softmax(teacher_logits / teacher_temperature + teacher_bias)``; the formula is in
    :mod:`dinov2_kernels.prototype_cross_entropy.reference`. It equals ``F.linear`` followed by
    :func:`soft_cross_entropy`, under autocast too: the product is in autocast's dtype, all else in float32. features,
    weight and weight_gain get gradients.

    Memory: beyond arguments and gradients, one chunk of 16 MB (256 MB on a GPU), or of 256 columns if these need more.
    FLOPs: 2 N K D forward, 6 N K D backward, which computes the logits again. The function is as deterministic as
    ``torch.mm``: chunks depend only on shapes and dtypes, and each sum in a kernel is made by one thread.

    Args:
        features: [N, D], any floating dtype.
        weight: [K, D] prototypes, any floating dtype. The product is in the dtype of features, or autocast's. With
            weight_gain, only the directions of these rows count.
        teacher_logits: [M, K], any floating dtype.
        student_temperature: above 0; 0.1 in DINO.
        teacher_temperature: above 0; 0.04 to 0.07 in DINO.
        teacher_bias: [K], added to the scaled teacher logits: -center / teacher_temperature for softmax centring, the
            result of :func:`sinkhorn_bias` for Sinkhorn-Knopp; None for no bias.
        row_weight: [N], factor on each row's loss; None for 1.
        teacher_index: [N] or [N, J] integers: the teacher rows whose targets a row learns. The J losses of a row are
            added. None pairs row n with teacher row n, with M = N. The values are checked on a CPU only.
        weight_gain: [K] or [K, 1]: prototypes are ``weight_gain * F.normalize(weight)``, weight normalisation
            (arXiv:1602.07868). None: prototypes are ``weight``.

    Returns:
        [N], float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> features, prototypes, teacher = torch.randn(4, 16), torch.randn(8, 16), torch.randn(4, 8)
        >>> temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.04}
        >>> loss = prototype_cross_entropy(features, prototypes, teacher, **temperatures)
        >>> loss.shape
        torch.Size([4])
        >>> expected = soft_cross_entropy(features @ prototypes.T, teacher, **temperatures)
        >>> torch.allclose(loss, expected, rtol=1e-4, atol=1e-4)
        True
    """
    beside, shape = ("features", features), features.shape
    check_tensor("features", features, len(shape) == 2 and shape[1] > 0, ("N", "D"), "with D >= 1", beside)
    N, D = shape
    is_weight = weight.dim() == 2 and weight.shape[1] == D and weight.shape[0] > 0
    check_tensor("weight", weight, is_weight, ("K", D), "with K >= 1 to match features", beside)
    K = weight.shape[0]
    is_teacher = teacher_logits.dim() == 2 and teacher_logits.shape[1] == K
    check_tensor("teacher_logits", teacher_logits, is_teacher, ("M", K), "to match weight", beside)
    M = teacher_logits.shape[0]
    if M != N and teacher_index is None:
        raise ValueError(f"teacher_logits: expected {N} rows, those of features, without a teacher_index, got {M}")
    if weight_gain is not None:
        is_gain = weight_gain.shape in ((K,), (K, 1))
        check_tensor("weight_gain", weight_gain, is_gain, (K,), f"or [{K}, 1] to match weight", beside)
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
    dtype = accumulation_dtype(features)
    teacher_logits = teacher_logits.detach()
    if accumulation_dtype(teacher_logits) != dtype:
        teacher_logits = teacher_logits.to(dtype)
    return _run(
        contiguous(features),
        contiguous(weight),
        None if weight_gain is None else weight_gain.reshape(K, 1),
        dense(teacher_logits),
        features.new_zeros(K, dtype=dtype) if teacher_bias is None else contiguous(teacher_bias.detach().to(dtype)),
        index,
        None if row_weight is None else row_weight.detach().to(dtype),
        student_temperature,
        teacher_temperature,
        autocast_dtype(features),
    )


def _run(features: Tensor, weight: Tensor, weight_gain: Tensor | None, *rest: Any) -> Tensor:
    if needs_gradient(features, weight, weight_gain):
        return differentiably(_PrototypeCrossEntropy, features, weight, weight_gain, *rest)  # type: ignore[no-any-return]
    loss: Tensor = _forward(features, weight, weight_gain, *rest)[0]
    return loss


class _PrototypeCrossEntropy(KernelFunction):
    definition = staticmethod(reference.prototype_cross_entropy_loss)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss: Tensor
        loss, state, norm = _forward(*args)
        *tensors, student_temperature, teacher_temperature, dtype = args
        ctx.save_for_backward(*tensors, state, norm)
        ctx.rest = student_temperature, teacher_temperature, dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if is_beyond_kernels(grad):
            *arguments, _, _ = ctx.saved_tensors
            return gradients_of_definition(_PrototypeCrossEntropy, ctx, (*arguments, *ctx.rest), grad)  # type: ignore[no-any-return]
        features, weight, gain = ctx.needs_input_grad[:3]
        wanted = [features, weight or gain]
        dfeatures, dweight, dgain = _backward(grad.contiguous(), *ctx.saved_tensors, *ctx.rest, wanted)
        return dfeatures if features else None, dweight if weight else None, dgain if gain else None, *[None] * 7
