"""Derivatives beyond the gradient through whole models: accelerated, of this library, and as their library has them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2.models import VisionTransformer, ViTConfig
from dinov2_kernels.integrations import accelerate
from tests.integrations.models import MODELS, images, operators_used, output, randomised

NAMES = [
    "timm with norms of queries and keys",
    "timm dinov2 with registers, SwiGLU",
    "transformers Dinov2Model",
    "transformers ViTModel",
    "facebook",
    "facebook, SwiGLU",
]


@pytest.fixture(autouse=True)
def math_attention() -> Iterator[None]:
    """PyTorch's fused attention has no such derivatives; its plain one has."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient for all weights of the squared length of the images' gradient."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(output(model, x).sin().sum(), x, create_graph=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(gradient.pow(2).sum(), weights, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def tangent_of_a_frozen_model(model: nn.Module, x: Tensor) -> Tensor:
    model.requires_grad_(False)
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(output(model, forward_ad.make_dual(x, x.sin()))).tangent


def jvp_of_a_frozen_model(model: nn.Module, x: Tensor) -> Tensor:
    model.requires_grad_(False)
    return torch.func.jvp(lambda x: output(model, x), (x,), (x.sin(),))[1]


def per_sample_gradients(model: nn.Module, x: Tensor) -> Tensor:
    """The gradients of each image for the last weights."""
    name, weight = next(
        (name, p)
        for name, p in model.named_parameters()
        if name.endswith(("qkv.weight", "query.weight", "q_proj.weight"))
    )

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Tensor:
            return output(self.model, image[None]).sin().sum()

    loss = Loss()
    of_one = torch.func.grad(
        lambda weight, image: torch.func.functional_call(loss, {f"model.{name}": weight}, (image,))
    )
    return torch.vmap(of_one, in_dims=(None, 0))(weight.detach(), x)


@pytest.mark.parametrize(
    "derivative", [gradient_penalty, tangent_of_a_frozen_model, jvp_of_a_frozen_model, per_sample_gradients]
)
@pytest.mark.parametrize("name", NAMES)
def test_accelerated_models(name: str, derivative: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = randomised(MODELS[name]()).double(), images(2).double()
    fused = accelerate(copy.deepcopy(model))
    with operators_used() as operators:
        output(fused, x)
    assert operators, "nothing runs on the kernels"
    expected = derivative(model, x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(derivative(fused, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_models_of_this_library(ffn: str) -> None:
    """Reverse mode, forward mode and a transform give the same second derivative along a direction."""
    model = VisionTransformer(
        ViTConfig(img_size=28, embed_dim=24, depth=2, num_heads=2, init_values=0.5, ffn=ffn)
    ).double()
    x, t = images(2).double()[..., :28, :28], images(4).double()[2:, ..., :28, :28]

    def loss(x: Tensor) -> Tensor:
        return model(x).sin().sum()

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, x, t)
    assert expected.abs().max() > 1e-6
    _, forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (x.detach(),), (t,))
    torch.testing.assert_close(forward_over_reverse, expected, rtol=1e-7, atol=1e-10)
    step = 1e-4
    above, below = (torch.autograd.grad(loss(z), z)[0] for z in (x + step * t, x - step * t))
    torch.testing.assert_close((above - below) / (2 * step), expected, rtol=1e-4, atol=1e-8)
