"""Residual branches that skip the work of dropped samples."""

from dinov2_kernels.residual.op import num_kept_samples, stochastic_depth

__all__ = ["num_kept_samples", "stochastic_depth"]
