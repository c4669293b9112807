"""LayerScale: a learned factor per channel of a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor that starts small (Touvron et al., arXiv:2103.17239).

    Args:
        dim: number of channels C.
        init_values: initial value of the factors.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))  # [C]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its initial value."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C]; returns the same shape."""
        return x * self.gamma
