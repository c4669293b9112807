"""What a call costs the host: so few tokens that Python, the dispatcher and the allocations are all there is of it.

PyTorch's own functions stand beside them. On a GPU nobody waits for a result, so that launches count and kernels do
not. With gradients, a call also records its backward pass, which does not run.

Predictions: an autograd function takes 5 us, an operator with its allocations 3 us, the draw of kept samples 10 us. So
`stochastic_depth` with gradients, two autograd functions and five operators: 50 us.

Measured (AMD EPYC with AVX-512, 2026-11-25, one thread, medians): 62 us with gradients and 33 without at drop rate 0.3,
38 and 19 without dropping. Gradients add 19 to 29 us, where 10 were predicted for two autograd functions. The eager
expression takes 11 and 8 us. `swiglu` takes 8.0 and 3.8 us, and its eager expression 4.6 and 3.1. Attention takes 22 to
24 us with gradients and 14 to 16 without, of which the eight tokens themselves are 6; SDPA takes 9.0 and 7.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import dinov2_kernels as dk

LAYOUT = dk.PackedLayout([(4, 2)])
T, H, D = LAYOUT.total_tokens, 2, 64
C = H * D


class Inputs:
    """What all functions take; every tensor is a leaf that wants its gradient."""

    def __init__(self, device: str) -> None:
        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, requires_grad=True)

        self.qkv = leaf(T, 3, H, D)
        self.packed = leaf(T, H, D), leaf(T, H, D), leaf(T, H, D)  # q, k, v
        self.dense = leaf(4, H, 2, D), leaf(4, H, 2, D), leaf(4, H, 2, D)  # the same sequences as one batch
        self.x, self.gate, self.value = leaf(T, C), leaf(T, C), leaf(T, C)
        self.x12 = leaf(T, 2 * C)
        self.gamma = leaf(C)
        self.norm = nn.LayerNorm(C, device=device)


def stochastic_depth(inputs: Inputs, drop_rate: float) -> Tensor:
    options = {"gamma": inputs.gamma, "norm": inputs.norm}
    return dk.stochastic_depth(inputs.x, LAYOUT, lambda h, _: h, drop_rate=drop_rate, **options)


def layer_norm(inputs: Inputs) -> Tensor:
    return F.layer_norm(inputs.x, (C,), inputs.norm.weight, inputs.norm.bias, inputs.norm.eps)


FUNCTIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "F.scaled_dot_product_attention": lambda inputs: F.scaled_dot_product_attention(*inputs.dense),
    "varlen_attention": lambda inputs: dk.varlen_attention(*inputs.packed, LAYOUT),
    "varlen_attention_qkvpacked": lambda inputs: dk.varlen_attention_qkvpacked(inputs.qkv, LAYOUT),
    "F.layer_norm": layer_norm,
    "x + gamma * F.layer_norm": lambda inputs: inputs.x + inputs.gamma * layer_norm(inputs),
    "stochastic_depth, drop rate 0": lambda inputs: stochastic_depth(inputs, 0.0),
    "stochastic_depth, drop rate 0.3": lambda inputs: stochastic_depth(inputs, 0.3),
    "F.silu * value": lambda inputs: F.silu(inputs.gate) * inputs.value,
    "swiglu": lambda inputs: dk.swiglu(inputs.x12),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking another thread takes 10 us or more: that would be all one measures of PyTorch's functions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gradient", [False, True], ids=["without gradient", "with gradient"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_host_overhead(benchmark: BenchmarkFixture, device: str, gradient: bool, name: str) -> None:
    benchmark.group = f"forward of {T} tokens on {device}, {'with' if gradient else 'without'} gradient"
    inputs = Inputs(device)
    with torch.set_grad_enabled(gradient):
        benchmark.pedantic(FUNCTIONS[name], (inputs,), rounds=31, iterations=300, warmup_rounds=3)
    benchmark.extra_info["microseconds_per_call"] = round(1e6 * benchmark.stats.stats.median, 2)
