"""SwiGLU of a feed-forward layer's features [rows, 2H]: eager PyTorch, compiled, and ours.

Prediction per result, with rows * H results and e bytes per element, on two cores with AVX-512 and 30 GB/s:

- Forward: the floor is 3e bytes and one exponential. Exponential and division are about 35 instructions for 16 results.
  Each instruction takes two passes on this processor: 0.6 ns on one core, 0.3 ns on both. float32: 12 bytes, 0.4 ns,
  limited by memory. bfloat16: 6 bytes, 0.2 ns, limited by arithmetic, so it gains less than half.
- Backward: the floor is 5e bytes and the same exponential.
- Eager: 5e bytes forward, and about 20e backward, because each half's gradient is padded with zeros and the two are
  added. So ours is 1.7 times faster forward and 3 times in all. ``torch.compile`` moves the same bytes as ours and
  takes the same time.
- Memory for results above 32 MB is mapped in every call, page by page: 0.25 ns a byte on one core with 4 KB pages, a
  third of it with 2 MB pages. For ViT-g in float32, eager and compiled code spend most of their time on this, so ours
  is 2 times faster than compiled code.

Measured (results/2026-11-25): 1.9 to 4.7 times faster than eager forward, 2.2 to 6.0 forward and backward. Over
``torch.compile``, the quotient of the two: 1.4 to 1.6 and 1.2 to 1.4, and 2.6 and 2.1 for ViT-g in float32. What the
prediction missed:

- Compiled code never takes the same time: even without fresh pages it takes 1.2 to 1.6 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dinov2_kernels import swiglu

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

ROWS = 2048
WIDTHS = {"ViT-g": 8192, "ViT-S": 2048}  # 2H
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16)]


def eager(x12: Tensor) -> Tensor:
    x1, x2 = x12.chunk(2, dim=-1)
    return F.silu(x1) * x2


def compiled() -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False)


PEERS = {"compiled": compiled, "swiglu": lambda: swiglu}


def gradient(function: Callable[[Tensor], Tensor], x12: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(function(x12), x12, grad)[0]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_forward(benchmark: BenchmarkFixture, compare: Compare, width: int, dtype: torch.dtype, peer: str) -> None:
    benchmark.group = f"SwiGLU of [{ROWS}, {width}] {dtype}, forward, speedup over eager"
    x12 = torch.randn(ROWS, width).to(dtype)
    function = PEERS[peer]()
    torch.testing.assert_close(function(x12), eager(x12))
    compare(lambda: function(x12), lambda: eager(x12), least_bytes=x12.nbytes // 2 * 3, rounds=31)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_forward_and_backward(
    benchmark: BenchmarkFixture, compare: Compare, width: int, dtype: torch.dtype, peer: str
) -> None:
    benchmark.group = f"SwiGLU of [{ROWS}, {width}] {dtype}, forward and backward, speedup over eager"
    x12 = torch.randn(ROWS, width).to(dtype).requires_grad_()
    grad = torch.randn(ROWS, width // 2).to(dtype)
    function = PEERS[peer]()
    torch.testing.assert_close(gradient(function, x12, grad), gradient(eager, x12, grad), rtol=0.02, atol=0.02)
    compare(
        lambda: gradient(function, x12, grad),
        lambda: gradient(eager, x12, grad),
        least_bytes=x12.nbytes // 2 * 8,
        rounds=31,
    )
