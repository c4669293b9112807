"""Residual connections and LayerNorm on a GPU in bfloat16, beside eager PyTorch, torch.compile and packages.

Memory limits all of them. Each group states the bytes that any implementation must move; an H200 moves 4.3 TB/s.

Prediction (no GPU has run this yet):

- Stochastic depth, 128 x 257 and 512 x 50 tokens with three tenths dropped, an empty branch: 13.7 m elements of 2
  bytes, where m is the number of elements of the kept tokens. Width 384: m is 15.7 million, so 0.43 GB or 0.10 ms at
  4.3 TB/s; at 75 to 85 % of that rate, 0.13 ms. Width 1024: 1.14 GB, 0.33 ms. The recipe moves about 25 m in some forty
  kernels: 0.25 ms and 0.60 ms if the host is fast enough, which it is not at width 384. So 1.8 to 2.5 times faster.
- LayerNorm at width 1024: the forward pass takes the time of PyTorch's, within 10 %. The backward pass also adds the
  gradient of the skip connection, for which PyTorch needs another kernel: 1.3 times faster forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks import gpu
from dinov2_kernels import PackedLayout, stochastic_depth
from dinov2_kernels.residual import num_kept_samples
from dinov2_kernels.residual.op import gather_norm
from dinov2_kernels.residual.sampling import Subset

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

LAYOUT = PackedLayout([(128, 257), (512, 50)])
DROP_RATE = 0.3
KEPT_TOKENS = sum(num_kept_samples(count, DROP_RATE) * length for count, length in LAYOUT.runs)
ROUNDS = 31
PREDICTED = {384: 0.13e-3, 1024: 0.33e-3}
"""Seconds of stochastic depth, by width."""

Step = Callable[[], Any]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


# ----------------------------------------------------------------------------------------------------- stochastic depth


class _Overwritable(torch.autograd.Function):
    """Return the same memory as a tensor that may be overwritten under autograd, like tokens inside a network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Connection:
    """Tokens, gradients and weights of one residual connection with LayerNorm and LayerScale and an empty branch."""

    def __init__(self, C: int) -> None:
        self.norm = nn.LayerNorm(C, eps=1e-6, device="cuda", dtype=torch.bfloat16)
        self.gamma = random(C).requires_grad_()
        self.weights = (self.gamma, self.norm.weight, self.norm.bias)
        self.x = random(LAYOUT.total_tokens, C).requires_grad_()
        self.dy = torch.randn_like(self.x)
        self.xs = [x.detach().clone().requires_grad_() for x in LAYOUT.unpack(self.x)]  # [count, length, C] each
        self.dys = LAYOUT.unpack(self.dy)

    def ours(self, inplace: bool) -> Step:
        def step() -> Any:
            x = _Overwritable.apply(self.x) if inplace else self.x
            y = stochastic_depth(
                x, LAYOUT, lambda h, _: h, drop_rate=DROP_RATE, gamma=self.gamma, norm=self.norm, inplace=inplace
            )
            return torch.autograd.grad(y, (self.x, *self.weights), self.dy)

        return step

    def recipe(self, add: Callable[..., Tensor]) -> Step:
        def step() -> Any:
            ys = [add(x, self.norm, self.gamma) for x in self.xs]
            return torch.autograd.grad(ys, (*self.xs, *self.weights), self.dys)

        return step

    def compiled_recipe(self) -> Step:
        torch._dynamo.reset()
        return self.recipe(torch.compile(add_residual, dynamic=False))

    def xformers(self) -> Step:
        operators = pytest.importorskip("xformers.ops")

        def step() -> Any:
            xs = [_Overwritable.apply(x) for x in self.xs]
            chosen = [torch.rand(len(x), device="cuda").argsort()[: num_kept_samples(len(x), DROP_RATE)] for x in xs]
            kept = operators.index_select_cat([x.flatten(1) for x in xs], chosen)  # one dimension, all kept tokens
            residual = self.norm(kept.view(-1, self.norm.normalized_shape[0]))
            residuals = residual.split([len(samples) * x.shape[1] for samples, x in zip(chosen, xs, strict=True)])
            ys = [
                operators.scaled_index_add(
                    x, samples, residual.view(-1, *x.shape[1:]), scaling=self.gamma, alpha=len(x) / len(samples)
                )
                for x, samples, residual in zip(xs, chosen, residuals, strict=True)
            ]
            return torch.autograd.grad(ys, (*self.xs, *self.weights), self.dys)

        return step


def add_residual(x: Tensor, norm: nn.LayerNorm, gamma: Tensor) -> Tensor:
    """The published recipe for the samples x [n, N, C] of one crop size."""
    n = len(x)
    kept = num_kept_samples(n, DROP_RATE)
    chosen = torch.rand(n, device=x.device).argsort()[:kept]
    residual = gamma * norm(x[chosen])
    return torch.index_add(x.flatten(1), 0, chosen, residual.flatten(1), alpha=n / kept).view_as(x)


CONNECTIONS: dict[str, Callable[[Connection], Step]] = {
    "compiled recipe": Connection.compiled_recipe,
    "xformers, in place": Connection.xformers,
    "stochastic_depth": lambda connection: connection.ours(inplace=False),
    "stochastic_depth, in place": lambda connection: connection.ours(inplace=True),
}


@pytest.mark.parametrize("peer", gpu.slow_to_build(CONNECTIONS))
@pytest.mark.parametrize("C", [384, 1024])
def test_stochastic_depth(benchmark: BenchmarkFixture, compare: Compare, C: int, peer: str) -> None:
    benchmark.group = f"stochastic depth, forward and backward, width {C}, in a CUDA graph, speedup over the recipe"
    connection = Connection(C)
    in_place = 10 * KEPT_TOKENS + 2 * LAYOUT.total_tokens
    elsewhere = 8 * KEPT_TOKENS + 4 * LAYOUT.total_tokens
    elements = C * (in_place if "in place" in peer else elsewhere)
    predicted = PREDICTED[C] if peer == "stochastic_depth" else None
    own, recipe = gpu.as_graph(CONNECTIONS[peer](connection)), gpu.as_graph(connection.recipe(add_residual))
    compare(own, recipe, least_bytes=2 * elements, rounds=ROUNDS, predicted=predicted)


# ------------------------------------------------------------------------------------------------------------ LayerNorm


def torch_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), x


def compiled_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    torch._dynamo.reset()
    forward = torch.compile(lambda x, norm: torch_norm(x, norm)[0], dynamic=False)
    return lambda x, norm: (forward(x, norm), x)


def liger_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    function = pytest.importorskip("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return lambda x, norm: (function.apply(x, norm.weight, norm.bias, norm.eps), x)


NORMS: dict[str, Callable[[], Callable[..., tuple[Tensor, Tensor]]]] = {
    "compiled": compiled_norm,
    "Liger": liger_norm,
    "gather_norm": lambda: lambda x, norm: gather_norm(x, Subset(LAYOUT), norm),
}


@pytest.mark.parametrize("peer", gpu.slow_to_build(NORMS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("C", [384, 1024])
def test_layer_norm(benchmark: BenchmarkFixture, compare: Compare, C: int, backward: bool, peer: str) -> None:
    """LayerNorm of all tokens; backward also adds the gradient of the skip connection, as every block must."""
    passes = "forward and backward" if backward else "forward"
    benchmark.group = f"LayerNorm, {passes}, width {C}, in a CUDA graph, speedup over PyTorch"
    norm = nn.LayerNorm(C, eps=1e-6, device="cuda", dtype=torch.bfloat16)
    x = random(LAYOUT.total_tokens, C).requires_grad_(backward)
    gradients = torch.randn_like(x), torch.randn_like(x)

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> Any:
        if not backward:
            with torch.no_grad():
                return function(x, norm)
        return torch.autograd.grad(function(x, norm), (x, norm.weight, norm.bias), gradients)

    function = NORMS[peer]()
    torch.testing.assert_close(function(x, norm)[0], torch_norm(x, norm)[0], atol=0.05, rtol=0.02)
    elements = (6 if backward else 2) * x.numel()
    own, plain = (gpu.as_graph(lambda f=f: step(f)) for f in (function, torch_norm))
    compare(own, plain, least_bytes=2 * elements, rounds=ROUNDS)
