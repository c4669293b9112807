"""LayerScale: a learned factor per channel of a residual branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor that starts small (Touvron et al., arXiv:2103.17239).

    Args:
        dim: number of channels C.
        init_values: initial value of the factors, one number or [C].
        inplace: overwrite the argument.
    """

    def __init__(self, dim: int, init_values: float | Tensor = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim))  # [C]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to its initial value."""
        with torch.no_grad():
            self.gamma.copy_(torch.as_tensor(self.init_values))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C]; returns the same shape."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
