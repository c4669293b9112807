"""The two feed-forward layers of DINOv2's vision transformers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dinov2_kernels.swiglu import swiglu


class Mlp(nn.Module):
    """Linear, activation, linear.

    Args:
        in_features: width of the input.
        hidden_features: width between the linear layers; that of the input by default.
        out_features: width of the output; that of the input by default.
        act_layer: makes the activation; the exact (erf) GELU by default.
        bias: biases of both linear layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class SwiGLUFFN(nn.Module):
    """SwiGLU feed-forward layer (arXiv:2002.05202) with about the parameters of an :class:`Mlp` of the same arguments.

    Args:
        in_features: width of the input.
        hidden_features: width an Mlp would have; the layer's own is ``swiglu_hidden_features`` of it.
        out_features: width of the output; that of the input by default.
        bias: biases of both linear layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_features = swiglu_hidden_features(hidden_features or in_features)
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]; returns [..., out_features]."""
        y: Tensor = self.w3(swiglu(self.w12(x)))
        return y


def swiglu_hidden_features(mlp_hidden_features: int) -> int:
    """Width of a SwiGLU layer with the parameters of an Mlp: two thirds of its width, rounded up to a multiple of 8."""
    return (int(mlp_hidden_features * 2 / 3) + 7) // 8 * 8
