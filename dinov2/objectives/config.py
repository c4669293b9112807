"""The weights and temperatures of the objective, in a module that needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dinov2.configuration import AtLeast0, Config, Count, Positive, Share

StudentLogits = Literal["stored", "recomputed"]


@dataclass(frozen=True)
class ObjectiveConfig(Config, at="objective"):
    """Weights and temperatures of DINO + iBOT + KoLeo. The teacher's temperature is scheduled, so it is not here."""

    centering: Literal["softmax", "sinkhorn_knopp"] = "softmax"
    """This keeps the teacher's targets from collapsing. softmax subtracts a moving average of the teacher's logits
    before the softmax. sinkhorn_knopp balances the batch over the prototypes."""
    student_temperature: Positive = 0.1
    """The student's softmax has this temperature."""
    dino_weight: AtLeast0 = 1.0
    """The loss on class tokens has this weight. A term of weight 0 is still measured."""
    ibot_weight: AtLeast0 = 1.0
    """The loss on masked patches has this weight."""
    koleo_weight: AtLeast0 = 0.1
    """The loss that spreads the class tokens of a batch has this weight; it needs at least 2 images in a batch."""
    center_momentum: Share = 0.9
    """softmax keeps this part of the centre at each step."""
    sinkhorn_iterations: Count = 3
    """Sinkhorn-Knopp runs this many iterations."""
    student_logits: StudentLogits = "stored"
    """stored keeps the student's scores over all prototypes for the loss. recomputed makes them in pieces, and again in
    the backward pass: it needs no memory for the scores and their gradients, but a third more arithmetic."""
