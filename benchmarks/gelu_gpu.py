"""The passes over a feed-forward layer's features in backward, on a GPU in bfloat16: PyTorch, torch.compile, and ours.

Bound by memory; an H200 moves 4.3 TB/s. Prediction, no GPU having run this yet, for the 40,900 tokens that three tenths
of stochastic depth leave of 128 x 257 and 512 x 50:

- GELU, 4096 features (ViT-L): 4 passes of 2 bytes, 1.34 GB or 0.31 ms; at 80 % of the bandwidth, 0.39 ms. PyTorch's
  operators move 6 passes in three kernels, and their sum over tokens reads column by column: 0.55 to 0.65 ms. So 0.2 ms
  a block, 5 ms of a step of 24 blocks.
- SwiGLU, 4096 gates (ViT-g): 6 passes, 2.0 GB or 0.47 ms; at 80 %, 0.58 ms. swiglu again, swiglu_backward and the sum
  move 10 passes: 1.0 ms.
- torch.compile fuses all but the sum over tokens, which takes a pass of its own: 5 and 8 passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.gelu import operators as gelu_operators
from benchmarks.gelu import ours as gelu_ours
from benchmarks.residual_gpu import KEPT_TOKENS, random, report
from dinov2_kernels.swiglu import swiglu_backward_

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

Pass = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def swiglu_operators(grad: Tensor, x12: Tensor) -> tuple[Tensor, ...]:
    """swiglu(x12), the gradient of x12, and its sum."""
    dx12 = torch.ops.dinov2_kernels.swiglu_backward(grad, x12)
    return torch.ops.dinov2_kernels.swiglu(x12), dx12, dx12.sum(dim=0)


def swiglu_ours(grad: Tensor, x12: Tensor) -> tuple[Tensor, ...]:
    dx12, dx12_sum = swiglu_backward_(grad, x12)
    return grad, dx12, dx12_sum


def swiglu_expression(grad: Tensor, x12: Tensor) -> tuple[Tensor, ...]:
    """The operators in PyTorch's, for torch.compile."""
    x1, x2 = x12.float().chunk(2, dim=-1)
    s = torch.sigmoid(x1)
    dx12 = torch.cat([grad * x2 * s * (1 + x1 * (1 - s)), grad * x1 * s], dim=-1).to(x12.dtype)
    return (F.silu(x1) * x2).to(x12.dtype), dx12, dx12.sum(dim=0)


def compiled(function: Pass) -> Pass:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def exact(function: Callable[[Tensor, Tensor, str], tuple[Tensor, ...]]) -> Pass:
    return lambda grad, z: function(grad, z, "none")


@pytest.mark.parametrize("peer", ["compiled", "gelu_backward_"])
@pytest.mark.parametrize("H", [1536, 4096])
def test_gelu(benchmark: BenchmarkFixture, compare: Compare, H: int, peer: str) -> None:
    benchmark.group = f"pass of GELU backward, {H} features, speedup over PyTorch"
    grad, z, baseline = random(KEPT_TOKENS, H).zero_(), random(KEPT_TOKENS, H), exact(gelu_operators)
    function = compiled(baseline) if peer == "compiled" else exact(gelu_ours)
    report(benchmark, compare, lambda: function(grad, z), lambda: baseline(grad, z), 4 * z.numel())


@pytest.mark.parametrize("peer", ["compiled", "swiglu_backward_"])
@pytest.mark.parametrize("H", [1024, 4096])
def test_swiglu(benchmark: BenchmarkFixture, compare: Compare, H: int, peer: str) -> None:
    benchmark.group = f"pass of SwiGLU backward, {H} gates, speedup over one operator after the other"
    x12 = random(KEPT_TOKENS, 2 * H)
    grad, other = random(KEPT_TOKENS, H), random(KEPT_TOKENS, H)  # ours overwrites it
    function = compiled(swiglu_expression) if peer == "compiled" else swiglu_ours
    report(benchmark, compare, lambda: function(grad, x12), lambda: swiglu_operators(other, x12), 6 * grad.numel())
