"""Attention over packed sequences of different lengths."""

from dinov2_kernels.attention.op import varlen_attention, varlen_attention_qkvpacked

__all__ = ["varlen_attention", "varlen_attention_qkvpacked"]
