"""Cross-entropy of a student against the soft targets of a teacher."""

from dinov2_kernels.cross_entropy.op import soft_cross_entropy

__all__ = ["soft_cross_entropy"]
