"""Multi-head self-attention over packed sequences."""

from __future__ import annotations

from torch import Tensor, nn

from dinov2_kernels.attention import varlen_attention_qkvpacked
from dinov2_kernels.packing import PackedLayout


class Attention(nn.Module):
    """Self-attention within each sequence: one linear layer for queries, keys and values, one for the output.

    Args:
        dim: width C of the tokens.
        num_heads: number of heads H; must divide ``dim``.
        qkv_bias: bias of the first linear layer.
        proj_bias: bias of the second.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, proj_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, layout: PackedLayout | None = None) -> Tensor:
        """x: [T, C] packed as ``layout`` says, or [B, N, C] without one; returns the same shape."""
        if layout is None:
            return self.forward(x.flatten(0, 1), PackedLayout([(x.shape[0], x.shape[1])])).view_as(x)
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))  # [T, 3, H, D]
        projected: Tensor = self.proj(varlen_attention_qkvpacked(qkv, layout).flatten(1))
        return projected
