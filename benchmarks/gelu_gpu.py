"""The pass over a feed-forward layer's features in backward, on a GPU in bfloat16: PyTorch, torch.compile, and ours.

Memory limits the pass; an H200 moves 4.3 TB/s. Prediction (no GPU has run this yet), for 4096 features (ViT-L) and the
40,900 tokens that remain of 128 x 257 and 512 x 50 at a drop rate of three tenths: 4 passes of 2 bytes are 1.34 GB or
0.31 ms; at 80 % of the bandwidth, 0.39 ms. PyTorch's operators move 6 passes in three kernels, and their sum over
tokens reads column by column: 0.55 to 0.65 ms. Ours thus saves 0.2 ms a block, 5 ms of a step of 24 blocks.
torch.compile fuses all but the sum over tokens, which needs a separate pass: 5 passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import gpu
from benchmarks.gelu import operators, ours
from benchmarks.residual_gpu import KEPT_TOKENS, random

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

SHARE_OF_BANDWIDTH = 0.8

Pass = Callable[[Tensor, Tensor, str], tuple[Tensor, ...]]


def compiled() -> Pass:
    torch._dynamo.reset()
    return torch.compile(operators, dynamic=False)


PEERS: dict[str, Callable[[], Pass]] = {"compiled": compiled, "gelu_backward_": lambda: ours}


@pytest.mark.parametrize("peer", gpu.slow_to_build(PEERS))
@pytest.mark.parametrize("H", [1536, 4096])
def test_gelu(benchmark: BenchmarkFixture, compare: Compare, H: int, peer: str) -> None:
    benchmark.group = f"pass of GELU backward, {H} features, in a CUDA graph, speedup over PyTorch"
    z, grad, other = (random(KEPT_TOKENS, H) for _ in range(3))  # ours overwrites its gradient
    function, least_bytes = PEERS[peer](), 4 * z.nbytes
    own = gpu.as_graph(lambda: function(grad, z, "none"))
    plain = gpu.as_graph(lambda: operators(other, z, "none"))
    predicted = gpu.floor_seconds(least_bytes) / SHARE_OF_BANDWIDTH if peer == "gelu_backward_" else None
    compare(own, plain, least_bytes=least_bytes, rounds=31, predicted=predicted)
