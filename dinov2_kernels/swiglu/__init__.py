"""The gate of SwiGLU feed-forward layers."""

from dinov2_kernels.swiglu.op import swiglu

__all__ = ["swiglu"]
