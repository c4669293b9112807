"""Two linear layers around an activation: values and gradients of the plain expression, in less memory and one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels.nn import Mlp, SwiGLUFFN
from tests.dispatches import Calls

T, WIDTH, HIDDEN = 12, 16, 64


def plain_mlp(layer: Mlp, x: Tensor) -> Tensor:
    return layer.fc2(layer.act(layer.fc1(x)))


def plain_swiglu(layer: SwiGLUFFN, x: Tensor) -> Tensor:
    gate, value = layer.w12(x).chunk(2, dim=-1)
    return layer.w3(F.silu(gate) * value)


LAYERS: list[tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = [
    (Mlp, plain_mlp),
    (partial(Mlp, act_layer=partial(nn.GELU, approximate="tanh")), plain_mlp),
    (SwiGLUFFN, plain_swiglu),
]


def with_gradients(function: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return [y, *torch.autograd.grad(y.square().sum(), [leaf, *filter(lambda p: p.requires_grad, layer.parameters())])]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_values_and_gradients_are_those_of_the_plain_expression(
    kind: Callable[..., nn.Module], plain: Callable[..., Tensor], bias: bool, bf16: bool
) -> None:
    torch.manual_seed(0)
    layer, x = kind(WIDTH, HIDDEN, bias=bias), torch.randn(3, T, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        got = with_gradients(layer, layer, x)
        expected = with_gradients(lambda leaf: plain(layer, leaf), layer, x)
    torch.testing.assert_close(got, expected, rtol=0.02 if bf16 else 1e-5, atol=0.02 if bf16 else 1e-5)
    assert [gradient.dtype for gradient in got] == [gradient.dtype for gradient in expected]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Mlp, SwiGLUFFN])
def test_keeps_its_argument_and_that_of_the_activation_alone(kind: type[nn.Module], bf16: bool) -> None:
    layer = kind(WIDTH, HIDDEN)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        held = layer(torch.randn(T, WIDTH, requires_grad=True))
    assert held.requires_grad
    argument = 2 * layer.w3.in_features if isinstance(layer, SwiGLUFFN) else HIDDEN
    assert sum(sizes.values()) == (2 if bf16 else 4) * T * (WIDTH + argument)


@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_float64(kind: Callable[..., nn.Module], plain: Callable[..., Tensor]) -> None:
    layer, x = kind(WIDTH, HIDDEN).double(), torch.randn(3, T, WIDTH, dtype=torch.float64)
    got, expected = with_gradients(layer, layer, x), with_gradients(partial(plain, layer), layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (0, WIDTH), (2, 0, WIDTH), (2, 3, 4, WIDTH)], ids=str)
@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_shapes(kind: Callable[..., nn.Module], plain: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    layer, x = kind(WIDTH, HIDDEN), torch.randn(shape)
    torch.testing.assert_close(with_gradients(layer, layer, x), with_gradients(partial(plain, layer), layer, x))


def test_strided_tokens() -> None:
    layer, x = Mlp(WIDTH, HIDDEN), torch.randn(WIDTH, T, 3)
    got = with_gradients(lambda leaf: layer(leaf.transpose(0, 2)), layer, x)
    torch.testing.assert_close(got, with_gradients(lambda leaf: plain_mlp(layer, leaf.transpose(0, 2)), layer, x))


@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_which_parts_are_frozen(kind: Callable[..., nn.Module], plain: Callable[..., Tensor]) -> None:
    """Every subset of tokens, weights and biases."""
    layer, x = kind(WIDTH, HIDDEN), torch.randn(T, WIDTH)
    parameters = list(layer.parameters())
    for wanted in product([False, True], repeat=1 + len(parameters)):
        if not any(wanted):
            continue
        for parameter, is_wanted in zip(parameters, wanted[1:], strict=True):
            parameter.requires_grad_(is_wanted)
        leaf = x.clone().requires_grad_(wanted[0])
        inputs = [tensor for tensor in (leaf, *parameters) if tensor.requires_grad]
        results = [torch.autograd.grad(f(leaf).square().sum(), inputs) for f in (layer, partial(plain, layer))]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(("kind", "operator"), [(Mlp, "gelu_backward_"), (SwiGLUFFN, "swiglu_backward_")])
def test_backward_is_one_pass_between_its_products(kind: type[nn.Module], operator: str) -> None:
    layer, x = kind(WIDTH, HIDDEN), torch.randn(T, WIDTH, requires_grad=True)
    y = layer(x).sum()
    with Calls() as calls:
        y.backward()
    elementwise = {"gelu", "gelu_backward", "dinov2_kernels::swiglu", "dinov2_kernels::swiglu_backward"}
    assert f"dinov2_kernels::{operator}" in calls.of
    assert not elementwise & calls.of.keys()


@pytest.mark.parametrize(("kind", "plain"), LAYERS)
def test_second_derivatives(kind: Callable[..., nn.Module], plain: Callable[..., Tensor]) -> None:
    layer, x = kind(3, 8).double(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    results = []
    for function in (layer, partial(plain, layer)):
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), inputs, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [Mlp, SwiGLUFFN])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_its_last_bias(kind: type[nn.Module], autocast: bool) -> None:
    layer, x = kind(WIDTH, HIDDEN), torch.randn(3, T, WIDTH)
    bias = layer.separable_bias()
    assert bias is (layer.w3 if isinstance(layer, SwiGLUFFN) else layer.fc2).bias
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result, expected = layer.forward_without_bias(x) + bias, layer(x)
        with torch.no_grad():
            torch.testing.assert_close(layer.forward_without_bias(x) + bias, result)
    tolerance = 0.02 if autocast else 1e-5
    torch.testing.assert_close(result, expected.to(result.dtype), rtol=tolerance, atol=tolerance)


def test_which_biases_are_separable() -> None:
    assert Mlp(WIDTH, HIDDEN, bias=False).separable_bias() is None
    dropping = Mlp(WIDTH, HIDDEN, drop=(0.0, 0.1))
    assert dropping.separable_bias() is None
    assert dropping.eval().separable_bias() is dropping.fc2.bias
    for name in ("fc2", "drop2"):
        watched = Mlp(WIDTH, HIDDEN)
        watched.get_submodule(name).register_forward_hook(lambda *_: None)
        assert watched.separable_bias() is None
    adapted = Mlp(WIDTH, HIDDEN)
    adapted.fc2 = type("LoRA", (nn.Linear,), {})(HIDDEN, WIDTH)
    assert adapted.separable_bias() is None


def test_layers_that_autocast_would_not_cast() -> None:
    layer = Mlp(WIDTH, HIDDEN)
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(T, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "names"), [(Mlp, ("fc1", "act", "drop1", "norm", "fc2", "drop2")), (SwiGLUFFN, ("w12", "w3", "drop"))]
)
def test_hooks_of_every_part_are_called(kind: type[nn.Module], names: tuple[str, ...]) -> None:
    for name in names:
        layer, seen = kind(WIDTH, HIDDEN), []
        layer.get_submodule(name).register_forward_hook(lambda *arguments, seen=seen: seen.append(arguments))
        layer(torch.randn(T, WIDTH))
        assert seen, name


def test_hooks_of_all_modules_are_called() -> None:
    layer, seen = Mlp(WIDTH, HIDDEN), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    layer(torch.randn(T, WIDTH))
    handle.remove()
    assert seen == [layer.fc1, layer.act, layer.drop1, layer.norm, layer.fc2, layer.drop2, layer]
