"""The kernels in the models of other libraries, and behind PyTorch's own attention."""

from dinov2_kernels.integrations.flash_attention import register_flash_attention

__all__ = ["register_flash_attention"]
