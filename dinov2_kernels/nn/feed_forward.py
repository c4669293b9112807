"""The two feed-forward layers of DINOv2's vision transformers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dinov2_kernels._modules import is_plain, linear, refuse_script, separable_bias
from dinov2_kernels.nn.fused_mlp import SWIGLU, fused_mlp, gelu
from dinov2_kernels.swiglu import swiglu


class Mlp(nn.Module):
    """Linear layer, activation, linear layer.

    Backward computes the result of a GELU again instead of keeping it, in the one pass between its matrix products.

    Args:
        in_features: width of the input.
        hidden_features: width between the linear layers; that of the input by default.
        out_features: width of the output; that of the input by default.
        act_layer: function that makes the activation; the exact (erf) GELU by default.
        drop: dropout rate after the activation and after the second linear layer; a pair for different rates.
        bias: whether the linear layers have biases; a pair for different choices.
        norm_layer: function that makes a norm of the hidden features from their width; no norm by default.

    Examples:
        >>> Mlp(64, 256)(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float | tuple[float, float] = 0.0,
        bias: bool | tuple[bool, bool] = True,
        *,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        drop1, drop2 = drop if isinstance(drop, tuple) else (drop, drop)
        bias1, bias2 = bias if isinstance(bias, tuple) else (bias, bias)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden_features) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2)
        self.drop2 = nn.Dropout(drop2)

    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        y: Tensor = self.drop2(self._run(x, bias=True))
        return y

    def separable_bias(self) -> Tensor | None:
        """The last bias [out_features], where the result is ``forward_without_bias(x)`` plus it; None elsewhere."""
        return separable_bias(self.fc2, self.drop2)

    def forward_without_bias(self, x: Tensor) -> Tensor:
        """The result without the bias that :meth:`separable_bias` returns."""
        return self._run(x, bias=False)

    def _run(self, x: Tensor, *, bias: bool) -> Tensor:
        act, drop1, norm = self.act, self.drop1, self.norm
        is_direct = is_plain(norm, nn.Identity) and is_plain(drop1, nn.Dropout) and not drop1.p
        if is_direct and isinstance(act, nn.GELU) and is_plain(act, nn.GELU):
            return fused_mlp(self.fc1, gelu(act.approximate), self.fc2, x, bias=bias)
        return linear(self.fc2, norm(drop1(act(self.fc1(x)))), bias=bias)


class SwiGLUFFN(nn.Module):
    """SwiGLU feed-forward layer (arXiv:2002.05202) with about as many parameters as an :class:`Mlp` of these arguments.

    It is facebook's ``SwiGLUFFNFused``, which its models use; facebook's ``SwiGLUFFN`` does not reduce
    ``hidden_features``. Backward computes the gated features again instead of keeping them, in the one pass between its
    matrix products.

    Args:
        in_features: width of the input.
        hidden_features: width of an Mlp; the width of this layer is ``swiglu_hidden_features`` of it.
        out_features: width of the output; that of the input by default.
        act_layer: accepted because an Mlp has it, but not used: the gate is SiLU.
        drop: dropout rate after the gate and after the second linear layer.
        bias: whether both linear layers have biases.

    Examples:
        >>> layer = SwiGLUFFN(64, 256)
        >>> layer(torch.randn(4, 10, 64)).shape
        torch.Size([4, 10, 64])
        >>> layer.w3.in_features  # two thirds of 256, rounded up
        176
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = swiglu_hidden_features(hidden_features or in_features)
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    __prepare_scriptable__ = refuse_script

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        y: Tensor = self.drop(self._run(x, bias=True))
        return y

    def separable_bias(self) -> Tensor | None:
        """The last bias [out_features], where the result is ``forward_without_bias(x)`` plus it; None elsewhere."""
        return separable_bias(self.w3, self.drop)

    def forward_without_bias(self, x: Tensor) -> Tensor:
        """The result without the bias that :meth:`separable_bias` returns."""
        return self._run(x, bias=False)

    def _run(self, x: Tensor, *, bias: bool) -> Tensor:
        drop = self.drop
        if is_plain(drop, nn.Dropout) and not drop.p:
            return fused_mlp(self.w12, SWIGLU, self.w3, x, bias=bias)
        return linear(self.w3, drop(swiglu(self.w12(x))), bias=bias)


def swiglu_hidden_features(mlp_hidden_features: int) -> int:
    """Width of a SwiGLU layer as large as an Mlp: two thirds of the Mlp's width, rounded up to a multiple of 8.

    Examples:
        >>> swiglu_hidden_features(4 * 1536)
        4096
    """
    return (int(mlp_hidden_features * 2 / 3) + 7) // 8 * 8
