"""Residual branches that skip the work of dropped samples."""

from dinov2_kernels.residual.sampling import num_kept_samples
from dinov2_kernels.residual.stochastic_depth import stochastic_depth

__all__ = ["num_kept_samples", "stochastic_depth"]
