"""The kernels in the models of other libraries: timm, transformers, and facebook's DINOv2."""

from dinov2_kernels.integrations.acceleration import accelerate, report, restore

__all__ = ["accelerate", "report", "restore"]
