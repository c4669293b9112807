"""Training objectives: the losses of students, and the update of their moving averages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2.lazily import names_from
from dinov2.objectives.config import ObjectiveConfig

if TYPE_CHECKING:
    from dinov2.objectives.distillation import Distillation
    from dinov2.objectives.networks import build_network, build_networks
    from dinov2.objectives.self_distillation import SelfDistillation, Views
else:
    __getattr__ = names_from(
        __name__,
        {
            "distillation": ("Distillation",),
            "losses": (),
            "networks": ("build_network", "build_networks"),
            "self_distillation": ("SelfDistillation", "Views"),
        },
    )

__all__ = ["Distillation", "ObjectiveConfig", "SelfDistillation", "Views", "build_network", "build_networks"]
