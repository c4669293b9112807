"""The backward pass of GELU between two linear layers, with what else is needed there."""

from dinov2_kernels.gelu.op import gelu_backward_

__all__ = ["gelu_backward_"]
