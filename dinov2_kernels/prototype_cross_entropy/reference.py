"""The last layer of a DINO head and its loss in plain PyTorch: the definition every kernel is tested against.

With features h [N, D], prototypes W [K, D], teacher logits t [M, K] and a bias b [K],

    s = h W^T                                   (the student's logits; W_k = g_k v_k / |v_k| with a gain g)
    q_m = softmax(t_m / T_teacher + b)          (the targets; no gradient)
    loss_n = -w_n sum_j sum_k q_index(n,j),k log_softmax(s_n / T_student)_k

(DINO, arXiv:2104.14294; iBOT, arXiv:2111.07832). With the sum Q_n of a row's targets, its mass |Q_n| = sum_k Q_nk, the
largest logit S_n and Z_n = sum_k exp((s_nk - S_n) / T),

    loss_n = w_n (|Q_n| log Z_n - sum_k Q_nk (s_nk - S_n) / T)

in which all terms have the same sign, so nothing cancels, however large the logits are; and, with the gradient g of
loss,

    ds_n = w_n g_n / T (|Q_n| softmax(s_n / T) - Q_n)        dh = ds W        dW = ds^T h

Everything about prototypes is a sum or a maximum over k, so it can be computed chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype

EPS = 1e-12  # as in torch.nn.functional.normalize


def widen(x: Tensor) -> Tensor:
    """x in the dtype of arithmetic."""
    return x.to(accumulation_dtype(x))


# --------------------------------------------------------------------------------------------- for a chunk of c columns


def prototype_target_norm(teacher_logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """[2, M]: the maximum over k of z = t / T + b, with t [M, K], and sum_k exp(z_k - maximum)."""
    z = widen(teacher_logits) / temperature + bias
    maximum = z.amax(dim=1)
    return torch.stack([maximum, torch.exp(z - maximum[:, None]).sum(dim=1)])


def prototype_targets_(targets: Tensor, teacher_logits: Tensor, bias: Tensor, norm: Tensor, temperature: float) -> None:
    """Write the targets q [M, c] for the columns in teacher_logits [M, c] and bias [c], with the norm [2, M]."""
    z = widen(teacher_logits) / temperature + bias
    targets.copy_(torch.exp(z - norm[0, :, None]) / norm[1, :, None])


def initial_state(N: int, like: Tensor) -> Tensor:
    """The state [4, N] of rows before any column: maximum S, sum Z, mass |Q|, and sum_k Q_nk (s_nk - S_n)."""
    state = torch.zeros(4, N, dtype=accumulation_dtype(like), device=like.device)
    state[0] = torch.finfo(state.dtype).min
    return state


def prototype_accumulate_(
    state: Tensor, logits: Tensor, targets: Tensor, index: Tensor | None, temperature: float
) -> None:
    """Add the columns of logits [N, c] and targets [M, c] to the state [4, N] of :func:`initial_state`.

    Q_n is the sum of the rows index[n] of targets; index is [N, J]. If it is None, Q_n is row n of targets.
    """
    s, q = widen(logits), _sum_of_targets(targets, index)
    maximum, total, mass, cross = state
    larger = torch.maximum(maximum, s.amax(dim=1))
    centred = s - larger[:, None]
    total = total * torch.exp((maximum - larger) / temperature) + torch.exp(centred / temperature).sum(dim=1)
    cross = cross - mass * (larger - maximum) + (q * centred).sum(dim=1)
    state.copy_(torch.stack([larger, total, mass + q.sum(dim=1), cross]))


def prototype_gradient_(
    logits: Tensor, state: Tensor, targets: Tensor, index: Tensor | None, row_scale: Tensor, temperature: float
) -> None:
    """Overwrite the logits s [N, c] with row_scale (|Q| softmax(s / T) - Q); the state is that of all columns."""
    maximum, total, mass, _ = state[:, :, None]
    p = torch.exp((widen(logits) - maximum) / temperature) * (mass / total)
    logits.copy_(row_scale[:, None] * (p - _sum_of_targets(targets, index)))


def _sum_of_targets(targets: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return targets
    total = targets[index[:, 0]]  # [N, c]
    for rows in index.unbind(1)[1:]:
        total = total + targets[rows]
    return total


# ------------------------------------------------------------------------------------------------- the prototypes W


def prototypes_of(weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W [K, D] in the dtype of the matrix product: weight, or gain [K, 1] times its normalised rows."""
    if gain is None:
        return weight.to(dtype)
    weight = widen(weight)
    return (weight * (gain / _norm(weight).clamp_min(EPS))).to(dtype)


def prototypes_backward(grad: Tensor, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight [K, D] and gain [K, 1] from the gradient of the prototypes [K, D].

    With u = v / |v|: dg = dW . u and dv = g / |v| (dW - (dW . u) u).
    """
    dtype, grad, weight = weight.dtype, widen(grad), widen(weight)
    norm = _norm(weight)
    divisor = norm.clamp_min(EPS)
    grad_gain = (grad * weight).sum(dim=1, keepdim=True) / divisor  # [K, 1]
    # Below EPS the divisor is constant, so nothing is subtracted from the gradient.
    along = torch.where(norm < EPS, 0.0, grad_gain / divisor)
    grad_weight = (grad - along * weight) * (gain / divisor)  # [K, D]
    return grad_weight.to(dtype), grad_gain.to(gain.dtype)


def _norm(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return norm


# ------------------------------------------------------------------------------------------- with the logits in memory


def prototype_cross_entropy(
    features: Tensor,
    weight: Tensor,
    weight_gain: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor,
    teacher_index: Tensor | None,
    row_weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], and what backward needs: the state [4, N] of the rows and the norm [2, M] of the targets.

    The matrix product is in ``dtype``; teacher_index is [N, J] or None; other arguments are as in the public function.
    """
    logits = _logits(features, weight, weight_gain, dtype)
    norm = prototype_target_norm(teacher_logits, teacher_bias, teacher_temperature)  # [2, M]
    targets = _targets(teacher_logits, teacher_bias, norm, teacher_temperature)
    state = initial_state(len(features), logits)
    prototype_accumulate_(state, logits, targets, teacher_index, student_temperature)
    return _loss(logits, targets, teacher_index, row_weight, student_temperature), state, norm


def prototype_cross_entropy_loss(
    features: Tensor,
    weight: Tensor,
    weight_gain: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor,
    teacher_index: Tensor | None,
    row_weight: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """The loss [N] alone, without writing into a tensor: for derivatives that kernels do not have."""
    logits = _logits(features, weight, weight_gain, dtype)
    targets = torch.softmax(widen(teacher_logits) / teacher_temperature + teacher_bias, dim=1)  # [M, K]
    return _loss(logits, targets, teacher_index, row_weight, student_temperature)


def prototype_cross_entropy_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    weight_gain: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor,
    teacher_index: Tensor | None,
    row_weight: Tensor | None,
    state: Tensor,
    norm: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features [N, D], weight [K, D] and weight_gain [K, 1], given that of the loss, grad [N].

    output_mask says whether that of features, and whether those of weight and gain are wanted; others are empty.
    """
    logits = _logits(features, weight, weight_gain, dtype)
    targets = _targets(teacher_logits, teacher_bias, norm, teacher_temperature)
    row_scale = row_scale_of(grad, row_weight, student_temperature)
    prototype_gradient_(logits, state, targets, teacher_index, row_scale, student_temperature)
    features_wanted, weight_wanted = output_mask
    dfeatures, dweight, dgain = features.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if features_wanted:
        dfeatures = (logits @ prototypes_of(weight, weight_gain, dtype)).to(features.dtype)
    if weight_wanted:
        dweight = (logits.t() @ features.to(dtype)).to(weight.dtype)
        if weight_gain is not None:
            dweight, dgain = prototypes_backward(dweight, weight, weight_gain)
    return dfeatures, dweight, dgain


def row_scale_of(grad: Tensor, row_weight: Tensor | None, temperature: float) -> Tensor:
    """w g / T [N]."""
    return (grad if row_weight is None else grad * row_weight) / temperature


def _logits(features: Tensor, weight: Tensor, weight_gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    return features.to(dtype) @ prototypes_of(weight, weight_gain, dtype).t()  # [N, K]


def _targets(teacher_logits: Tensor, teacher_bias: Tensor, norm: Tensor, temperature: float) -> Tensor:
    targets = torch.empty(teacher_logits.shape, dtype=norm.dtype, device=norm.device)  # [M, K]
    prototype_targets_(targets, teacher_logits, teacher_bias, norm, temperature)
    return targets


def _loss(
    logits: Tensor, targets: Tensor, index: Tensor | None, row_weight: Tensor | None, temperature: float
) -> Tensor:
    log_probabilities = torch.log_softmax(widen(logits) / temperature, dim=1)
    loss = -(_sum_of_targets(targets, index) * log_probabilities).sum(dim=1)
    return loss if row_weight is None else loss * row_weight
