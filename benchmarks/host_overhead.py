"""The host time of a call: with so few tokens, only Python, the dispatcher and the allocations take time.

Sequences have 2 tokens, or none, so that the kernels have nothing to do. PyTorch's own functions run beside ours. On a
GPU nothing waits for a result, so launches count and kernels do not. With gradients, a call also records its backward
pass, which does not run.

Prediction: an autograd function takes 5 us, an operator with its allocations 3 us, the draw of kept samples 10 us. So
`stochastic_depth` with gradients, with two autograd functions and five operators, takes 50 us.

Measured (AMD EPYC with AVX-512, 2026-11-27, one thread, empty bodies): attention takes 7 to 8 us, with gradients 11.
The parts of `stochastic_depth` take 6 us for the draw, 7 for the gather and 3 for the scatter; with gradients 6, 12 and
7. Together, with the checks between them, they take 19 and 30 us, and 13 and 22 us without dropping. The prediction was
too high: it counted five operators where three are called, and the draw takes 6 us. On 2026-11-25 the whole took 33 and
62 us. A kernel allocates six results through PyTorch's stable C++ interface, which costs 0.9 us each. Without the
dispatcher, one costs 0.6 us, but tests could then no longer fill it with NaN to find what a kernel did not write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import dinov2_kernels as dk
from dinov2_kernels.residual.op import gather_norm, scatter_add
from dinov2_kernels.residual.sampling import draw_subsets

S, H, D = 4, 2, 64
C = H * D


class Inputs:
    """The inputs of all functions, for S sequences of N tokens; every tensor is a leaf that requires a gradient."""

    def __init__(self, device: str, N: int) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, requires_grad=True)

        self.layout = dk.PackedLayout([(S, N)])
        T = self.layout.total_tokens
        self.qkv = leaf(T, 3, H, D)
        self.packed = leaf(T, H, D), leaf(T, H, D), leaf(T, H, D)  # q, k, v
        self.dense = leaf(S, H, N, D), leaf(S, H, N, D), leaf(S, H, N, D)  # the same sequences as one batch
        self.x, self.gate, self.value = leaf(T, C), leaf(T, C), leaf(T, C)
        self.x12 = leaf(T, 2 * C)
        self.gamma = leaf(C)
        self.norm = nn.LayerNorm(C, device=device)
        (self.subset,) = draw_subsets(self.x, self.layout, [0.3])
        self.residual = leaf(self.subset.layout.total_tokens, C)


def stochastic_depth(inputs: Inputs, drop_rate: float) -> Tensor:
    options = {"gamma": inputs.gamma, "norm": inputs.norm}
    return dk.stochastic_depth(inputs.x, inputs.layout, lambda h, _: h, drop_rate=drop_rate, **options)


def scatter(inputs: Inputs) -> Tensor:
    return scatter_add(inputs.x, inputs.residual, inputs.subset, inputs.gamma, None)


def layer_norm(inputs: Inputs) -> Tensor:
    return F.layer_norm(inputs.x, (C,), inputs.norm.weight, inputs.norm.bias, inputs.norm.eps)


FUNCTIONS: dict[str, Callable[[Inputs], object]] = {
    "F.scaled_dot_product_attention": lambda inputs: F.scaled_dot_product_attention(*inputs.dense),
    "varlen_attention": lambda inputs: dk.varlen_attention(*inputs.packed, inputs.layout),
    "varlen_attention_qkvpacked": lambda inputs: dk.varlen_attention_qkvpacked(inputs.qkv, inputs.layout),
    "F.layer_norm": layer_norm,
    "x + gamma * F.layer_norm": lambda inputs: inputs.x + inputs.gamma * layer_norm(inputs),
    "stochastic_depth, drop rate 0": lambda inputs: stochastic_depth(inputs, 0.0),
    "stochastic_depth, drop rate 0.3": lambda inputs: stochastic_depth(inputs, 0.3),
    "its draw": lambda inputs: draw_subsets(inputs.x, inputs.layout, [0.3]),
    "its gather and LayerNorm": lambda inputs: gather_norm(inputs.x, inputs.subset, inputs.norm),
    "its scatter": scatter,
    "F.silu * value": lambda inputs: F.silu(inputs.gate) * inputs.value,
    "swiglu": lambda inputs: dk.swiglu(inputs.x12),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: to wake another takes 10 us or more, which would hide the rest of PyTorch's functions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gradient", [False, True], ids=["without gradient", "with gradient"])
@pytest.mark.parametrize("N", [2, 0], ids=["2 tokens", "empty"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_host_overhead(benchmark: BenchmarkFixture, device: str, N: int, gradient: bool, name: str) -> None:
    body = f"{S} sequences of {N} tokens" if N else "an empty body"
    benchmark.group = f"forward of {body} on {device}, {'with' if gradient else 'without'} gradient"
    inputs = Inputs(device, N)
    with torch.set_grad_enabled(gradient):
        benchmark.pedantic(FUNCTIONS[name], (inputs,), rounds=31, iterations=300, warmup_rounds=3)
    benchmark.extra_info["microseconds_per_call"] = round(1e6 * benchmark.stats.stats.median, 2)
