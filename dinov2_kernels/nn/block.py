"""The pre-norm transformer block of DINOv2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from dinov2_kernels.nn.attention import Attention
from dinov2_kernels.nn.feed_forward import Mlp
from dinov2_kernels.nn.layer_scale import LayerScale
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import stochastic_depth

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
"""The norm of DINOv2's models."""


class Block(nn.Module):
    """Attention and feed-forward layer, each as a residual branch after a LayerNorm.

    In training, a ``drop_path`` above 0 sends only a random subset of the samples through each branch
    (:func:`dinov2_kernels.stochastic_depth`), whatever the rate. facebook's code does the same for a list of crops; for
    a single tensor it does so only above 0.1, and below multiplies the samples by Bernoulli variables, which have the
    same expectation but save no work.

    Args:
        dim: width C of the tokens.
        num_heads: heads of the attention.
        mlp_ratio: width of the feed-forward layer in units of ``dim``.
        qkv_bias, proj_bias, ffn_bias: biases of the linear layers.
        drop_path: share of the samples that each branch drops in training, in [0, 1).
        init_values: initial LayerScale of the branches; None or 0 for no LayerScale.
        norm_layer: makes a norm from its width.
        ffn_layer: makes the feed-forward layer: :class:`Mlp` or :class:`SwiGLUFFN`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        ffn_layer: Callable[..., nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(in_features=dim, hidden_features=int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def forward(self, x: Tensor, layout: PackedLayout | None = None) -> Tensor:
        """x: [T, C] packed as ``layout`` says, or [B, N, C] without one; returns the same shape."""
        if layout is None:
            return self.forward(x.flatten(0, 1), PackedLayout([(x.shape[0], x.shape[1])])).view_as(x)
        rate = self.drop_path if self.training else 0.0
        x = stochastic_depth(x, layout, self.attn, drop_rate=rate, gamma=_gamma(self.ls1), norm=self.norm1)
        return stochastic_depth(x, layout, self._feed_forward, drop_rate=rate, gamma=_gamma(self.ls2), norm=self.norm2)

    def _feed_forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        y: Tensor = self.mlp(x)  # token by token, whatever the layout
        return y


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None
