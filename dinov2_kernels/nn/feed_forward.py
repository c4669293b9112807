"""The two feed-forward layers of DINOv2's vision transformers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dinov2_kernels.nn.activated_linear import SWIGLU, activated_linear, gelu
from dinov2_kernels.swiglu import swiglu


class Mlp(nn.Module):
    """Linear, activation, linear.

    Backward makes the result of a GELU again, in place of keeping it.

    Args:
        in_features: width of the input.
        hidden_features: width between the linear layers; that of the input by default.
        out_features: width of the output; that of the input by default.
        act_layer: makes the activation; the exact (erf) GELU by default.
        drop: dropout after the activation and of the result; a pair for different rates.
        bias: biases of the linear layers; a pair for different choices.
        norm_layer: makes a norm of the hidden features from their width; none by default.
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

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        z = self.fc1(x)  # [..., hidden_features]
        if type(self.act) is nn.GELU and not self.drop1.p and isinstance(self.norm, nn.Identity):
            y: Tensor = self.drop2(activated_linear(self.fc2, gelu(self.act.approximate), z))
        else:
            y = self.drop2(self.fc2(self.norm(self.drop1(self.act(z)))))
        return y


class SwiGLUFFN(nn.Module):
    """SwiGLU feed-forward layer (arXiv:2002.05202) with about the parameters of an :class:`Mlp` of the same arguments.

    facebook's ``SwiGLUFFNFused``, the one its models have; the ``SwiGLUFFN`` there takes ``hidden_features`` as it is.
    Backward makes the gated features again, in place of keeping them.

    Args:
        in_features: width of the input.
        hidden_features: width an Mlp would have; the layer's own is ``swiglu_hidden_features`` of it.
        out_features: width of the output; that of the input by default.
        act_layer: accepted as an Mlp's is, and not used: the gate is SiLU.
        drop: dropout after the gate and of the result.
        bias: biases of both linear layers.
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

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        z = self.w12(x)  # [..., 2 hidden_features]
        y: Tensor = self.drop(self.w3(self.drop(swiglu(z))) if self.drop.p else activated_linear(self.w3, SWIGLU, z))
        return y


def swiglu_hidden_features(mlp_hidden_features: int) -> int:
    """Width of a SwiGLU layer with the parameters of an Mlp: two thirds of its width, rounded up to a multiple of 8."""
    return (int(mlp_hidden_features * 2 / 3) + 7) // 8 * 8
