"""The gate of SwiGLU feed-forward layers."""

from dinov2_kernels.swiglu.op import swiglu, swiglu_backward_

__all__ = ["swiglu", "swiglu_backward_"]
