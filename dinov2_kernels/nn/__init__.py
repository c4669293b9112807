"""Modules of a vision transformer with facebook's parameter names, for packed batches and ordinary ones."""

from dinov2_kernels.nn.attention import Attention
from dinov2_kernels.nn.block import Block, DropPath, LayerScale, run_blocks
from dinov2_kernels.nn.feed_forward import Mlp, SwiGLUFFN, swiglu_hidden_features

__all__ = ["Attention", "Block", "DropPath", "LayerScale", "Mlp", "SwiGLUFFN", "run_blocks", "swiglu_hidden_features"]
