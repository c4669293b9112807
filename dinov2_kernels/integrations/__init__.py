"""The kernels in models of other libraries (timm, transformers, facebook) and in PyTorch's own attention."""

from dinov2_kernels.integrations.acceleration import accelerate, report, restore
from dinov2_kernels.integrations.flash_attention import register_flash_attention

__all__ = ["accelerate", "register_flash_attention", "report", "restore"]
