"""The pre-norm transformer block of DINOv2, a run of several blocks, and the small modules of residual branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dinov2_kernels._modules import is_plain, is_unwatched, refuse_script
from dinov2_kernels.nn.attention import Attention
from dinov2_kernels.nn.feed_forward import Mlp, SwiGLUFFN
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import Connection, Subset, draw_subsets, residual_chain

_SEPARABLE = (Attention, Mlp, SwiGLUFFN)
"""Parts that can also run without their last bias."""
_SEPARABLE_FORWARDS = [part.forward for part in _SEPARABLE]  # kept here, because tools may replace a class's forward


class Block(nn.Module):
    """Attention and feed-forward layer, each as a residual branch after a norm.

    In training, a ``drop_path`` above 0 sends only a random subset of the samples through each branch
    (:func:`dinov2_kernels.stochastic_depth`), at every rate. facebook's code does the same for a list of crops. For a
    single tensor it does so only above 0.1; below, it multiplies the samples by Bernoulli variables, as timm always
    does. These have the same expectation but save no work.

    Positional arguments have facebook's order. Arguments or names that only timm has are keywords.

    Args:
        dim: width C of the tokens.
        num_heads: number of heads of the attention.
        mlp_ratio: width of the feed-forward layer in units of ``dim``.
        qkv_bias, proj_bias, ffn_bias: whether the linear layers have biases.
        drop: dropout in the feed-forward layer and of the attention's result.
        attn_drop: as for :class:`Attention`.
        init_values: initial LayerScale of the branches; None or 0 for no LayerScale.
        drop_path: share of the samples that each branch drops in training, in [0, 1).
        act_layer: function that makes the activation of the feed-forward layer.
        norm_layer: function that makes a norm from its width. DINOv2's models have LayerNorms with an eps of 1e-6.
        attn_class: class of the attention, which is called with (tokens [T, C], layout).
        ffn_layer: class of the feed-forward layer: :class:`Mlp` or :class:`SwiGLUFFN`.
        qk_norm: as for :class:`Attention`.
        proj_drop: timm's name for ``drop``.
        mlp_layer: timm's name for ``ffn_layer``.
        recompute: keep 2 T C elements less for backward, which recovers the normalised tokens from tensors that the
            branches keep anyway. The gradient of norm weights loses precision if they are small compared with their
            biases, in bfloat16 up to ten times. All other gradients are the same.

    Examples:
        >>> block = Block(128, num_heads=2, init_values=1e-5, drop_path=0.3)
        >>> block(torch.randn(4, 10, 128)).shape  # a batch of equal lengths
        torch.Size([4, 10, 128])
        >>> block(torch.randn(16, 128), PackedLayout([(2, 5), (3, 2)])).shape  # packed
        torch.Size([16, 128])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = Attention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        *,
        qk_norm: bool = False,
        proj_drop: float | None = None,
        mlp_layer: Callable[..., nn.Module] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        drop = drop if proj_drop is None else proj_drop
        qk_norms = {"qk_norm": True, "norm_layer": norm_layer} if qk_norm else {}
        self.drop_path = drop_path
        self.recompute = recompute
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            **qk_norms,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = (mlp_layer or ffn_layer)(
            in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=drop, bias=ffn_bias
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor, layout: PackedLayout | None = None, subsets: Sequence[Subset] | None = None) -> Tensor:
        """Tokens after both branches.

        Args:
            x: [T, C] packed as ``layout`` says, or [B, N, C] without a layout.
            layout: the samples of x.
            subsets: the samples that go through each of the two branches
                (:func:`dinov2_kernels.residual.draw_subsets`), for a network that draws the samples of all its blocks
                at once; by default the block draws its own.

        Returns:
            Tokens in the shape of x.
        """
        if layout is None:
            return self.forward(x.flatten(0, 1), PackedLayout([(x.shape[0], x.shape[1])]), subsets).view_as(x)
        subsets = subsets or draw_subsets(x, layout, self.drop_rates)
        return residual_chain(x, layout, self.connections(subsets), recompute=self.recompute)

    def connections(self, subsets: Sequence[Subset]) -> list[Connection]:
        """The two branches as :func:`dinov2_kernels.residual.residual_chain` takes them; ``subsets`` as in forward."""
        of_attention, of_mlp = subsets
        attend, gamma, bias = _branch(self.attn, self.ls1)
        feed_forward, mlp_gamma, mlp_bias = _branch(self.mlp, self.ls2)

        def each_token(tokens: Tensor, _: PackedLayout) -> Tensor:  # whatever the layout
            y: Tensor = feed_forward(tokens)
            return y

        return [
            Connection(attend, of_attention, norm=self.norm1, gamma=gamma, bias=bias),
            Connection(each_token, of_mlp, norm=self.norm2, gamma=mlp_gamma, bias=mlp_bias),
        ]

    @property
    def drop_rates(self) -> tuple[float, float]:
        """Share of the samples that each branch drops in the current mode, training or evaluation."""
        rate = self.drop_path if self.training else 0.0
        return rate, rate


_BLOCK_FORWARD = Block.forward  # kept for the same reason as _SEPARABLE_FORWARDS


def run_blocks(
    blocks: Sequence[nn.Module], x: Tensor, layout: PackedLayout, subsets: Sequence[Sequence[Subset]]
) -> Tensor:
    """Run several blocks in a row: ``x = block(x, layout, of_block)`` for each, where of_block are its subsets.

    Consecutive plain :class:`Block` modules run as one :func:`dinov2_kernels.residual.residual_chain`, which joins the
    end of one and the start of the next in one pass. A block is called by itself if it has hooks (FSDP sets them), has
    another forward (activation checkpointing needs it), or is compiled by itself.

    Args:
        blocks: modules with the call signature of :class:`Block`.
        x: [T, C] packed as ``layout`` says.
        layout: the samples of x.
        subsets: for each block, the subsets of its two branches.

    Returns:
        [T, C] in the dtype of x.

    Raises:
        ValueError: there are more or fewer subsets than blocks, or an argument is not as described.

    Examples:
        >>> blocks = [Block(128, num_heads=2, drop_path=0.3) for _ in range(2)]
        >>> layout = PackedLayout([(2, 5), (3, 2)])
        >>> x = torch.randn(layout.total_tokens, 128)
        >>> subsets = draw_subsets(x, layout, [rate for block in blocks for rate in block.drop_rates])
        >>> run_blocks(blocks, x, layout, [subsets[:2], subsets[2:]]).shape
        torch.Size([16, 128])
    """
    if len(blocks) != len(subsets):
        raise ValueError(f"subsets: expected one pair for each of the {len(blocks)} blocks, got {len(subsets)}")
    chain: list[Connection] = []  # connections of blocks that have not run yet
    recompute = False
    for block, of_block in zip(blocks, subsets, strict=True):
        plain = block if _is_plain(block) else None
        if chain and (plain is None or plain.recompute != recompute):
            x = residual_chain(x, layout, chain, recompute=recompute)
            chain = []
        if plain is None:
            x = block(x, layout, of_block)
        else:
            chain += plain.connections(of_block)
            recompute = plain.recompute
    return residual_chain(x, layout, chain, recompute=recompute) if chain else x


class LayerScale(nn.Module):
    """Multiply every channel by a learned factor that starts small (Touvron et al., arXiv:2103.17239).

    Args:
        dim: number of channels C.
        init_values: initial value of the factors, one number or [C].
        inplace: overwrite the input.

    Examples:
        >>> LayerScale(2, init_values=0.5)(torch.ones(3, 2)).detach()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000],
                [0.5000, 0.5000]])
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


class DropPath(nn.Module):
    """In training, set the residual of each sample to zero with a given probability (arXiv:1603.09382).

    The residual of a dropped sample is still computed; :func:`dinov2_kernels.stochastic_depth` and :class:`Block` do
    not compute it.

    Args:
        drop_prob: probability of dropping a sample.
        scale_by_keep: divide the kept samples by ``1 - drop_prob``, which preserves the expectation.

    Examples:
        >>> y = DropPath(0.5)(torch.ones(1000, 3))
        >>> y.unique()  # a sample is dropped, or counts twice
        tensor([0., 2.])
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


def _is_plain(block: nn.Module) -> TypeGuard[Block]:
    """Whether a call of the block only runs its chain of connections."""
    return isinstance(block, Block) and type(block).forward is _BLOCK_FORWARD and is_unwatched(block)


def _without_last_bias(part: nn.Module) -> tuple[Callable[..., Tensor], Tensor | None]:
    """A function that runs a part without its last bias, and that bias; if this is not possible, the part and None."""
    if not isinstance(part, _SEPARABLE) or type(part).forward not in _SEPARABLE_FORWARDS:
        return part, None
    bias = part.separable_bias() if is_unwatched(part) else None
    return (part, None) if bias is None else (part.forward_without_bias, bias)


_LAYER_SCALE_FORWARD = LayerScale.forward  # kept for the same reason as _SEPARABLE_FORWARDS


def _branch(part: nn.Module, layer_scale: nn.Module) -> tuple[Callable[..., Tensor], Tensor | None, Tensor | None]:
    """A function that runs a part, and the gamma and the last bias that are left for the residual to apply.

    A LayerScale that must be called is a part of the function.
    """
    gamma: Tensor | None = None
    if isinstance(layer_scale, LayerScale) and type(layer_scale).forward is _LAYER_SCALE_FORWARD:
        is_read = is_unwatched(layer_scale)
        gamma = layer_scale.gamma if is_read else None
    else:
        is_read = is_plain(layer_scale, nn.Identity)
    if not is_read:
        return (lambda *inputs: layer_scale(part(*inputs))), None, None
    run, bias = _without_last_bias(part)
    return run, gamma, bias
