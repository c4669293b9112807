"""SwiGLU on a GPU in bfloat16, beside eager PyTorch, torch.compile and Liger; and its pass of a layer's backward.

Memory limits SwiGLU: for each element of the result, 3 elements of 2 bytes move forward, and 5 more backward.
Prediction (no GPU has run this yet): as fast as torch.compile, and twice as fast as eager PyTorch, which writes silu
and reads it back.

The pass of a feed-forward layer's backward moves 6 elements for each gate. 4096 gates (ViT-g) are 2.0 GB or 0.47 ms; at
80 % of the bandwidth, 0.58 ms. swiglu again, swiglu_backward and the sum over tokens move 10 elements: 1.0 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import gpu
from dinov2_kernels import swiglu
from dinov2_kernels.swiglu import swiglu_backward_

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

TOKENS = 40773  # seven tenths of the samples of 128 crops of 257 tokens and 512 of 50
SHARE_OF_BANDWIDTH = 0.8

Gate = Callable[[Tensor], Tensor]


def torch_swiglu(x12: Tensor) -> Tensor:
    gate, value = x12.chunk(2, dim=-1)
    return F.silu(gate) * value


def compiled_swiglu() -> Gate:
    torch._dynamo.reset()
    return torch.compile(torch_swiglu, dynamic=False)


def liger_swiglu() -> Gate:
    function = pytest.importorskip("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return lambda x12: function.apply(*x12.chunk(2, dim=-1))


PEERS: dict[str, Callable[[], Gate]] = {"compiled": compiled_swiglu, "Liger": liger_swiglu, "swiglu": lambda: swiglu}


@pytest.mark.parametrize("peer", gpu.slow_to_build(PEERS))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("H", [1024, 4096])
def test_swiglu(benchmark: BenchmarkFixture, compare: Compare, H: int, backward: bool, peer: str) -> None:
    """Liger takes gate and value separately, so it copies them out of the layer's result."""
    passes = "forward and backward" if backward else "forward"
    benchmark.group = f"SwiGLU, {passes}, {H} features, in a CUDA graph, speedup over PyTorch"
    x12 = torch.randn(TOKENS, 2 * H, dtype=torch.bfloat16, device="cuda", requires_grad=backward)
    grad = torch.randn(TOKENS, H, dtype=torch.bfloat16, device="cuda")

    def step(function: Gate) -> Any:
        y = function(x12)
        return torch.autograd.grad(y, x12, grad) if backward else y

    function = PEERS[peer]()
    torch.testing.assert_close(function(x12), torch_swiglu(x12), atol=0.05, rtol=0.02)
    least_bytes = 2 * (8 if backward else 3) * grad.numel()
    predicted = gpu.floor_seconds(least_bytes) / SHARE_OF_BANDWIDTH if peer == "swiglu" else None
    own, plain = (gpu.as_graph(lambda f=f: step(f)) for f in (function, torch_swiglu))
    compare(own, plain, least_bytes=least_bytes, rounds=31, predicted=predicted)


def one_after_the_other(grad: Tensor, x12: Tensor) -> tuple[Tensor, ...]:
    """swiglu(x12), the gradient of x12, and its sum over tokens."""
    dx12 = torch.ops.dinov2_kernels.swiglu_backward(grad, x12)
    return torch.ops.dinov2_kernels.swiglu(x12), dx12, dx12.sum(dim=0)


@pytest.mark.parametrize("peer", ["swiglu_backward_"])
@pytest.mark.parametrize("H", [1024, 4096])
def test_pass_of_backward(benchmark: BenchmarkFixture, compare: Compare, H: int, peer: str) -> None:
    benchmark.group = f"pass of SwiGLU backward, {H} gates, in a CUDA graph, speedup over one operator after the other"
    x12 = torch.randn(TOKENS, 2 * H, dtype=torch.bfloat16, device="cuda")
    grad, other = torch.randn(2, TOKENS, H, dtype=torch.bfloat16, device="cuda")  # ours overwrites its gradient
    least_bytes = 6 * grad.nbytes
    predicted = gpu.floor_seconds(least_bytes) / SHARE_OF_BANDWIDTH
    own, plain = (
        gpu.as_graph(lambda f=f, g=g: f(g, x12)) for f, g in ((swiglu_backward_, grad), (one_after_the_other, other))
    )
    compare(own, plain, least_bytes=least_bytes, rounds=31, predicted=predicted)
