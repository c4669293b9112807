"""Kernels of DINOv2 pretraining as drop-in PyTorch functions.

Every function takes ordinary tensors on any device, and the device decides which implementation runs: compiled C++ on
CPU, Triton or CUDA C++ on NVIDIA GPUs, plain PyTorch on other devices. :func:`info` reports what runs where.
"""

from dinov2_kernels import integrations
from dinov2_kernels._backend import info, use_backend
from dinov2_kernels.attention import varlen_attention, varlen_attention_qkvpacked
from dinov2_kernels.cross_entropy import soft_cross_entropy
from dinov2_kernels.koleo import koleo_loss, nearest_neighbors
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.photometric import PhotometricDistribution, PhotometricPlan, draw_plan, photometric
from dinov2_kernels.prototype_cross_entropy import prototype_cross_entropy
from dinov2_kernels.residual import stochastic_depth
from dinov2_kernels.sinkhorn import sinkhorn_bias, sinkhorn_biases, sinkhorn_knopp
from dinov2_kernels.swiglu import swiglu

__all__ = [
    "PackedLayout",
    "PhotometricDistribution",
    "PhotometricPlan",
    "draw_plan",
    "info",
    "integrations",
    "koleo_loss",
    "nearest_neighbors",
    "photometric",
    "prototype_cross_entropy",
    "sinkhorn_bias",
    "sinkhorn_biases",
    "sinkhorn_knopp",
    "soft_cross_entropy",
    "stochastic_depth",
    "swiglu",
    "use_backend",
    "varlen_attention",
    "varlen_attention_qkvpacked",
]
