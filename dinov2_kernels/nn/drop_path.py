"""Stochastic depth as a mask on the samples of a batch."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Sets the residual of every sample to zero with a given probability, in training (arXiv:1603.09382).

    The residual is computed all the same: :func:`dinov2_kernels.stochastic_depth` and :class:`Block` save that work.

    Args:
        drop_prob: probability of dropping a sample.
        scale_by_keep: divide what is kept by ``1 - drop_prob``, which preserves the expectation.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ...]; returns the same shape."""
        if not self.training or not self.drop_prob:
            return x
        keep_prob = 1 - self.drop_prob
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep_prob)  # [B, 1, ...]
        return x * (kept / keep_prob if self.scale_by_keep and keep_prob else kept)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"
