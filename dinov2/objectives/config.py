"""Configuration of the self-distillation objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Centering = Literal["softmax", "sinkhorn_knopp"]
StudentLogits = Literal["stored", "recomputed"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and temperatures of DINO + iBOT + KoLeo. The teacher's temperature is scheduled, so it is not here."""

    centering: Centering = "softmax"
    """How the teacher's targets are kept from collapsing: subtract a moving average of its logits before the softmax,
    or balance the batch over the prototypes by Sinkhorn-Knopp."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    dino_weight: float = 1.0
    """Weight of the loss on class tokens. A term of weight 0 is still measured."""
    ibot_weight: float = 1.0
    """Weight of the loss on masked patches."""
    koleo_weight: float = 0.1
    """Weight of the loss that spreads the class tokens of a batch; needs at least 2 images in the batch."""
    center_momentum: float = 0.9
    """Part of the centre kept at each step, for softmax centring."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn-Knopp."""
    student_logits: StudentLogits = "stored"
    """Whether the student's scores over all prototypes are stored for the loss, or made in pieces, and again in the
    backward pass: that takes memory for neither scores nor their gradients, but a third more arithmetic."""

    def __post_init__(self) -> None:
        if self.centering not in get_args(Centering):
            raise ValueError(f"centering: expected one of {', '.join(get_args(Centering))}, got {self.centering!r}")
        if self.student_logits not in get_args(StudentLogits):
            expected = ", ".join(get_args(StudentLogits))
            raise ValueError(f"student_logits: expected one of {expected}, got {self.student_logits!r}")
        if not self.student_temperature > 0:
            raise ValueError(f"student_temperature: expected a number above 0, got {self.student_temperature}")
        for name in ("dino_weight", "ibot_weight", "koleo_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)}")
        if not 0 <= self.center_momentum <= 1:
            raise ValueError(f"center_momentum: expected a number from 0 to 1, got {self.center_momentum}")
        if self.sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations: expected at least 1, got {self.sinkhorn_iterations}")
