"""Multi-head self-attention over packed sequences."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dinov2_kernels._modules import is_plain, linear, refuse_script, separable_bias
from dinov2_kernels.attention import varlen_attention, varlen_attention_qkvpacked
from dinov2_kernels.packing import PackedLayout


class Attention(nn.Module):
    """Self-attention within each sequence: one linear layer for queries, keys and values, one for the output.

    Args:
        dim: width C of the tokens.
        num_heads: number of heads H; must divide ``dim``.
        qkv_bias: whether the first linear layer has a bias.
        proj_bias: whether the second linear layer has a bias.
        attn_drop: dropout of the attention weights; must be 0, because the kernels never store these weights.
        proj_drop: dropout of the result.
        qk_norm: normalise queries and keys in each head (arXiv:2302.05442).
        norm_layer: function that makes these norms from the width of a head.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``attn_drop`` is not 0.

    Examples:
        >>> attention = Attention(128, num_heads=2)
        >>> attention(torch.randn(4, 10, 128)).shape  # a batch of equal lengths
        torch.Size([4, 10, 128])
        >>> attention(torch.randn(16, 128), PackedLayout([(2, 5), (3, 2)])).shape  # packed
        torch.Size([16, 128])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        qk_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        if attn_drop:
            raise ValueError(f"attn_drop: expected 0, because the kernels drop no attention weights, got {attn_drop}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor, layout: PackedLayout | None = None) -> Tensor:
        """x: [T, C] packed as ``layout`` says, or [B, N, C] without a layout; returns the same shape."""
        if layout is None:
            return self.forward(x.flatten(0, 1), PackedLayout([(x.shape[0], x.shape[1])])).view_as(x)
        projected: Tensor = self.proj_drop(self._run(x, layout, bias=True))
        return projected

    def separable_bias(self) -> Tensor | None:
        """The last bias [C], if the result is ``forward_without_bias(x, layout)`` plus this bias; else None."""
        return separable_bias(self.proj, self.proj_drop)

    def forward_without_bias(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """The result for packed tokens x [T, C] without the bias that :meth:`separable_bias` returns."""
        return self._run(x, layout, bias=False)

    def _run(self, x: Tensor, layout: PackedLayout, *, bias: bool) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))  # [T, 3, H, D]
        q_norm, k_norm = self.q_norm, self.k_norm
        has_norms = not (is_plain(q_norm, nn.Identity) and is_plain(k_norm, nn.Identity))
        y = attend(qkv, layout, (q_norm, k_norm) if has_norms else None)
        return linear(self.proj, y.flatten(1), bias=bias)


def attend(
    qkv: Tensor,
    layout: PackedLayout,
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of qkv [T, 3, H, D], after the norms of queries and of keys, if any; returns [T, H, D]."""
    if norms is None:
        return varlen_attention_qkvpacked(qkv, layout, scale=scale)
    q, k, v = qkv.unbind(1)
    q_norm, k_norm = norms
    q, k = q_norm(q).to(v.dtype), k_norm(k).to(v.dtype)  # autocast widens norms
    return varlen_attention(q, k, v, layout, scale=scale)
