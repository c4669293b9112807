"""Residual branches that do not compute dropped samples."""

from dinov2_kernels.residual.sampling import Subset, draw_subsets, num_kept_samples
from dinov2_kernels.residual.stochastic_depth import Connection, residual_chain, stochastic_depth

__all__ = ["Connection", "Subset", "draw_subsets", "num_kept_samples", "residual_chain", "stochastic_depth"]
