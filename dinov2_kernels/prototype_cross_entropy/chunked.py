"""The two operators of :mod:`dinov2_kernels.prototype_cross_entropy.reference` in chunks of prototypes.

For a chunk of c prototypes, a matrix product makes the student logits [N, c], a kernel makes the targets [M, c] of the
same columns, and another kernel combines both in place. Except arguments and results, nothing is larger than a chunk.

FLOPs: one product is 2 N K D. Forward takes one product. Backward takes three: the logits again, the gradient of the
features and the gradient of the prototypes. Two ways to share work were counted and rejected:

- The forward pass could sum the gradient of the features, as Flash Attention sums its result. The gradient of the
  prototypes still needs the logits again, so this saves no product, and a pass without gradient would need one more.
- Cross-entropy is linear in its targets: loss and gradient of the features need the mean q_m W [D] of the prototypes
  under a target, so rows need not read their targets column by column. This adds 2 M K D FLOPs in forward, and as many
  in backward for q^T times the sums of h that share a target. It saves 4 J N K: with M = J N and D = 256, it costs 256
  times what it saves. In 16 bits it would also round p and q separately, and lose the digits of their difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype, define
from dinov2_kernels.prototype_cross_entropy import reference

_TRITON = "dinov2_kernels.prototype_cross_entropy.triton_kernel"

# Bytes of logits, targets and prototypes together. On a CPU they stay in the last-level cache. On a GPU, computing a
# chunk takes longer than its 25 kernel launches take the host.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
LEAST_COLUMNS = 256  # even if they exceed CHUNK_BYTES: matrix products with fewer columns are slow


def _fake_target_norm(teacher_logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return teacher_logits.new_empty(2, teacher_logits.shape[0], dtype=accumulation_dtype(teacher_logits))


def _fake_in_place(*_: Any) -> None:
    pass


# Rows of teacher_logits may have any stride; all else is contiguous. reference.py has the shapes.
_target_norm = define(
    "prototype_target_norm(Tensor teacher_logits, Tensor bias, float temperature) -> Tensor",
    reference=reference.prototype_target_norm,
    fake=_fake_target_norm,
    triton=f"{_TRITON}:prototype_target_norm",
).call
_targets_ = define(
    "prototype_targets_(Tensor(a!) targets, Tensor teacher_logits, Tensor bias, Tensor norm, float temperature) -> ()",
    reference=reference.prototype_targets_,
    fake=_fake_in_place,
    triton=f"{_TRITON}:prototype_targets_",
).call
_accumulate_ = define(
    "prototype_accumulate_(Tensor(a!) state, Tensor logits, Tensor targets, Tensor? index, float temperature) -> ()",
    reference=reference.prototype_accumulate_,
    fake=_fake_in_place,
    triton=f"{_TRITON}:prototype_accumulate_",
).call
_gradient_ = define(
    "prototype_gradient_(Tensor(a!) logits, Tensor state, Tensor targets, Tensor? index, Tensor row_scale, "
    "float temperature) -> ()",
    reference=reference.prototype_gradient_,
    fake=_fake_in_place,
    triton=f"{_TRITON}:prototype_gradient_",
).call


@dataclass(frozen=True)
class Chunk:
    """One chunk of c prototypes: its columns, the prototypes [c, D], logits [N, c] and targets [M, c]."""

    columns: slice
    prototypes: Tensor
    logits: Tensor
    targets: Tensor


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
    """Loss [N], state [4, N], and norm [2, M] of the targets, as in reference.py."""
    features = features.to(dtype)
    norm = _target_norm(teacher_logits, teacher_bias, teacher_temperature)  # [2, M]
    state = reference.initial_state(len(features), features)  # [4, N]
    for chunk in _chunks(features, weight, weight_gain, teacher_logits, teacher_bias, norm, teacher_temperature):
        _accumulate_(state, chunk.logits, chunk.targets, teacher_index, student_temperature)
    _, total, mass, cross = state
    loss = mass * total.log() - cross / student_temperature  # [N]
    return loss if row_weight is None else loss * row_weight, state, norm


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
    """Gradients of features [N, D], weight [K, D] and weight_gain [K, 1]; output_mask as in the definition."""
    features_wanted, weight_wanted = output_mask
    h = features.to(dtype)
    dfeatures = torch.zeros_like(h, dtype=accumulation_dtype(h)) if features_wanted else h.new_empty(0)  # [N, D]
    dweight = torch.empty_like(weight) if weight_wanted else weight.new_empty(0)  # [K, D]
    dgain = weight.new_empty(0) if weight_gain is None or not weight_wanted else torch.empty_like(weight_gain)  # [K, 1]
    row_scale = reference.row_scale_of(grad, row_weight, student_temperature)  # [N]
    for chunk in _chunks(h, weight, weight_gain, teacher_logits, teacher_bias, norm, teacher_temperature):
        _gradient_(chunk.logits, state, chunk.targets, teacher_index, row_scale, student_temperature)
        if features_wanted:
            dfeatures += torch.mm(chunk.logits, chunk.prototypes, out=torch.empty_like(h))
        if weight_wanted:
            columns, dprototypes = chunk.columns, torch.empty_like(chunk.prototypes)  # [c, D]
            torch.mm(chunk.logits.t(), h, out=dprototypes)
            if weight_gain is None:
                dweight[columns] = dprototypes
            else:
                dweight[columns], dgain[columns] = reference.prototypes_backward(
                    dprototypes, weight[columns], weight_gain[columns]
                )
    return dfeatures.to(features.dtype), dweight, dgain


def _chunks(
    h: Tensor,
    weight: Tensor,
    weight_gain: Tensor | None,
    teacher_logits: Tensor,
    teacher_bias: Tensor,
    norm: Tensor,
    temperature: float,
) -> Iterator[Chunk]:
    """All prototypes, chunk by chunk. The next chunk overwrites the memory of the one before."""
    (N, D), (M, K) = h.shape, teacher_logits.shape
    bytes_per_column = N * h.itemsize + M * norm.itemsize + D * weight.itemsize
    width = columns_of_a_chunk(bytes_per_column, K, h.device.type)
    logits_memory, targets_memory = h.new_empty(N * width), norm.new_empty(M * width)
    for start in range(0, K, width):
        columns = slice(start, min(start + width, K))
        c = columns.stop - start
        gain = None if weight_gain is None else weight_gain[columns]
        prototypes = reference.prototypes_of(weight[columns], gain, h.dtype)
        logits, targets = logits_memory[: N * c].view(N, c), targets_memory[: M * c].view(M, c)
        torch.mm(h, prototypes.t(), out=logits)
        _targets_(targets, teacher_logits[:, columns], teacher_bias[columns], norm, temperature)
        yield Chunk(columns, prototypes, logits, targets)


def columns_of_a_chunk(bytes_per_column: int, K: int, device_type: str) -> int:
    """A power of two, or K if that is smaller. It is the same in every run, so results are too."""
    columns = max(CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // bytes_per_column, LEAST_COLUMNS)
    return min(1 << (columns.bit_length() - 1), K)
