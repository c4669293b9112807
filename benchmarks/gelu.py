"""GELU between the two linear layers of a feed-forward layer: the pass of its backward, and the whole layer.

T = 5520 is the number of tokens of 8 images, with 2 crops of 197 tokens and 8 of 37. C = 384 channels and H = 1536
features are those of ViT-S. Prediction with e bytes per element, on two cores with AVX-512 and 30 GB/s:

- The pass: the floor is 4e bytes a feature, and about 50 vector instructions for 16 results, 1 ns on one core. float32:
  16 bytes, 0.5 ns. Memory and arithmetic take equally long: 5 ms. PyTorch's operators, one after the other, move 6e
  bytes in three passes, and compute erf or tanh twice: 1.5 to 2 times as long. ``torch.compile`` fuses the same.
- The layer: 39 GFLOP of matrix products at 100 to 150 GFLOP/s in float32, so 300 ms. The pass saves 3 to 5 ms of them,
  1 to 2 %. In bfloat16, where products are faster, it saves no more than 5 %.

Measured (results/2026-11-30): the pass is 4.9 times as fast as PyTorch's operators in float32 and 1.7 times in
bfloat16; with tanh 6.2 and 4.8 times. The prediction missed two things: ours needs half the fresh memory, in pages of 2
MB, and tanh is slow in PyTorch. ``torch.compile`` gains little over the operators (0.9 to 1.5), because its sum over
tokens does not fuse. On two threads, the layer is 1.04 times as fast as the plain expression in float32 and 1.01 times
in bfloat16. In processor time of one thread, it is 1.09 and 1.08 times as fast as the layer that computed GELU again
separately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dinov2_kernels.gelu import gelu_backward_
from dinov2_kernels.nn import Mlp

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

T, C, H = 8 * (2 * 197 + 8 * 37), 384, 1536
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16)]
Results = tuple[Tensor, Tensor, Tensor]


def operators(grad: Tensor, z: Tensor, approximate: str) -> Results:
    """gelu(z), the gradient of z, and its sum, by one operator of PyTorch after the other."""
    dz = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
    return F.gelu(z, approximate=approximate), dz, dz.sum(dim=0)


def compiled_operators() -> Callable[[Tensor, Tensor, str], Results]:
    torch._dynamo.reset()
    return torch.compile(operators, dynamic=False)


def ours(grad: Tensor, z: Tensor, approximate: str) -> Results:
    h, dz_sum = gelu_backward_(grad, z, approximate=approximate)
    return h, grad, dz_sum


PASSES = {"compiled": compiled_operators, "gelu_backward_": lambda: ours}


@pytest.mark.parametrize("peer", PASSES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pass(benchmark: BenchmarkFixture, compare: Compare, dtype: torch.dtype, approximate: str, peer: str) -> None:
    benchmark.group = f"pass of GELU({approximate}) backward over [{T}, {H}] {dtype}, speedup over eager"
    grad, z = torch.randn(2, T, H).to(dtype)
    function = PASSES[peer]()
    torch.testing.assert_close(
        function(grad.clone(), z, approximate)[:2], operators(grad, z, approximate)[:2], rtol=0.02, atol=0.02
    )
    grad.zero_()  # zeros stay zeros when the operator overwrites them
    compare(
        lambda: function(grad, z, approximate),
        lambda: operators(grad, z, approximate),
        least_bytes=4 * z.nbytes,
        rounds=31,
    )


def plain(layer: Mlp, x: Tensor) -> Tensor:
    """Keeps the result of GELU."""
    y: Tensor = layer.fc2(layer.act(layer.fc1(x)))
    return y


def compiled_layer() -> Callable[[Mlp, Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(plain, dynamic=False)


LAYERS = {"compiled": compiled_layer, "Mlp": lambda: lambda layer, x: layer(x)}


@pytest.mark.parametrize("peer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(benchmark: BenchmarkFixture, compare: Compare, dtype: torch.dtype, peer: str) -> None:
    benchmark.group = f"feed-forward layer of [{T}, {C}] {dtype}, forward and backward, speedup over eager"
    layer, x, grad = Mlp(C, H).to(dtype), torch.randn(T, C).to(dtype).requires_grad_(), torch.randn(T, C).to(dtype)
    inputs = [x, *layer.parameters()]
    function = LAYERS[peer]()

    def step(forward: Callable[[Mlp, Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(layer, x), inputs, grad)

    torch.testing.assert_close(step(function)[0], step(plain)[0], rtol=0.02, atol=0.02)
    products = 3 * 2 * T * C * H * 2  # two products forward, four backward
    compare(
        lambda: step(function),
        lambda: step(plain),
        least_bytes=6 * T * H * x.element_size(),  # GELU forward, and the pass
        rounds=15,
        flops=products,
    )
