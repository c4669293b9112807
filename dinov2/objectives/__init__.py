"""Training objectives: the losses of students, and the update of their moving averages."""

from dinov2.objectives.distillation import Distillation
from dinov2.objectives.losses import ObjectiveConfig
from dinov2.objectives.networks import build_network, build_networks
from dinov2.objectives.self_distillation import SelfDistillation, Views

__all__ = ["Distillation", "ObjectiveConfig", "SelfDistillation", "Views", "build_network", "build_networks"]
