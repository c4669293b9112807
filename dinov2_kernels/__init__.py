"""Kernels of DINOv2 pretraining as drop-in PyTorch functions.

Every function takes ordinary tensors on any device and picks its implementation by the device: compiled C++ on CPU,
Triton or CUDA C++ on NVIDIA GPUs, plain PyTorch everywhere else. :func:`info` tells what runs where.
"""

from dinov2_kernels._backend import info, use_backend
from dinov2_kernels.sinkhorn import sinkhorn_bias, sinkhorn_knopp

__all__ = [
    "info",
    "sinkhorn_bias",
    "sinkhorn_knopp",
    "use_backend",
]
