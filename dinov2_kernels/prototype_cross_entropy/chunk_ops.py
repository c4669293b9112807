"""The operators on one chunk of prototypes, and the one before them over the teacher's whole rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dinov2_kernels._library import accumulation_dtype, define
from dinov2_kernels.prototype_cross_entropy import reference

_TRITON = "dinov2_kernels.prototype_cross_entropy.triton_kernel"


def _fake_target_norm(teacher_logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return teacher_logits.new_empty(2, teacher_logits.shape[0], dtype=accumulation_dtype(teacher_logits))


def _fake_in_place(*_: Any) -> None:
    pass


# Rows of teacher_logits may lie any distance apart; all else is contiguous. Shapes stand in reference.py.
target_norm = define(
    "prototype_target_norm(Tensor teacher_logits, Tensor bias, float temperature) -> Tensor",
    reference=reference.prototype_target_norm,
    fake=_fake_target_norm,
    triton=f"{_TRITON}:prototype_target_norm",
).call
targets_ = define(
    "prototype_targets_(Tensor(a!) targets, Tensor teacher_logits, Tensor bias, Tensor norm, float temperature) -> ()",
    reference=reference.prototype_targets_,
    fake=_fake_in_place,
    triton=f"{_TRITON}:prototype_targets_",
).call
accumulate_ = define(
    "prototype_accumulate_(Tensor(a!) state, Tensor logits, Tensor targets, Tensor? index, float temperature) -> ()",
    reference=reference.prototype_accumulate_,
    fake=_fake_in_place,
    triton=f"{_TRITON}:prototype_accumulate_",
).call
gradient_ = define(
    "prototype_gradient_(Tensor(a!) logits, Tensor state, Tensor targets, Tensor? index, Tensor row_scale, "
    "float temperature) -> ()",
    reference=reference.prototype_gradient_,
    fake=_fake_in_place,
    triton=f"{_TRITON}:prototype_gradient_",
).call
