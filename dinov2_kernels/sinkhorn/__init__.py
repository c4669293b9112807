"""The Sinkhorn-Knopp step of DINOv2's teacher."""

from dinov2_kernels.sinkhorn.op import sinkhorn_bias, sinkhorn_biases, sinkhorn_knopp

__all__ = ["sinkhorn_bias", "sinkhorn_biases", "sinkhorn_knopp"]
