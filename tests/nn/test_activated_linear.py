"""A linear layer over an activation that is made again: the plain expression's values and gradients, in less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels import swiglu
from dinov2_kernels.nn import Mlp, SwiGLUFFN

T, WIDTH, HIDDEN = 12, 16, 64


def plain_mlp(layer: Mlp, x: Tensor) -> Tensor:
    return layer.fc2(F.gelu(layer.fc1(x)))


def plain_swiglu(layer: SwiGLUFFN, x: Tensor) -> Tensor:
    return layer.w3(swiglu(layer.w12(x)))


LAYERS: list[tuple[type[nn.Module], Callable[..., Tensor]]] = [(Mlp, plain_mlp), (SwiGLUFFN, plain_swiglu)]


def with_gradients(function: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *filter(lambda p: p.requires_grad, layer.parameters())])]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_values_and_gradients_are_those_of_the_plain_expression(
    kind: type[nn.Module], plain: Callable[..., Tensor], bias: bool, bf16: bool
) -> None:
    torch.manual_seed(0)
    layer, x = kind(WIDTH, HIDDEN, bias=bias), torch.randn(3, T, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        got = with_gradients(layer, layer, x)
        expected = with_gradients(lambda leaf: plain(layer, leaf), layer, x)
    torch.testing.assert_close(got, expected, rtol=0.02 if bf16 else 1e-5, atol=0.02 if bf16 else 1e-5)
    assert [gradient.dtype for gradient in got] == [gradient.dtype for gradient in expected]


@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_the_result_of_the_activation_is_not_kept(kind: type[nn.Module], plain: Callable[..., Tensor]) -> None:
    layer = kind(WIDTH, HIDDEN)
    hidden = layer.w3.in_features if isinstance(layer, SwiGLUFFN) else HIDDEN

    def kept(function: Callable[[Tensor], Tensor]) -> int:
        parameters = {parameter.data_ptr() for parameter in layer.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = function(torch.randn(T, WIDTH, requires_grad=True))
        assert held.requires_grad
        return sum(sizes.values())

    assert kept(lambda x: plain(layer, x)) - kept(layer) == 4 * T * hidden


def test_frozen_weights_get_no_gradient() -> None:
    layer = Mlp(WIDTH, HIDDEN)
    layer.fc2.requires_grad_(False)
    x = torch.randn(T, WIDTH)
    torch.testing.assert_close(
        with_gradients(layer, layer, x), with_gradients(lambda leaf: plain_mlp(layer, leaf), layer, x)
    )


def test_hooks_of_the_second_layer_are_called() -> None:
    layer, seen = Mlp(WIDTH, HIDDEN), []
    layer.fc2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    layer(torch.randn(T, WIDTH))
    assert seen == [(T, HIDDEN)]
