"""Sinkhorn-Knopp of the teacher's logits [B, 65536]: DINOv2's recipe in eager PyTorch and compiled, beside ours.

Prediction, per float32 element, two threads of a 2-core machine with AVX-512 (27 GB/s of memory, about 3 GHz):

- The recipe: exp, transpose, sums and divisions of the whole matrix are about 162 bytes in 20 passes. A fresh matrix is
  mapped page by page three times. So 9 ns.
- ``sinkhorn_bias``: 12 bytes in three reads take 0.44 ns. The 3 exponentials with loads, scaling and sums take some 25
  instructions for 16 elements, 0.25 ns on one core. In two iterations, adding up the kept exponentials takes 0.06 ns
  more. This is 0.9 ns of arithmetic, 0.45 ns on two threads, and most of the reads run meanwhile: 0.6 ns, 5 ms for B =
  128, 40 ms for B = 1024, 15 times faster than the recipe. bfloat16 moves half the bytes but computes the same.
- ``sinkhorn_knopp``: floor 20 bytes. It needs one more exponential, and writes and maps the result [B, K].

Measured (results/2026-11-25): ``sinkhorn_bias`` is 9 times faster than the recipe in float32, 10 to 13 times in
bfloat16. ``sinkhorn_knopp`` is 4.7 and 6 times faster if memory for its result is available. What the prediction
missed:

- The recipe takes 5.5 ns if the processor has AVX-512.
- ``sinkhorn_bias`` takes 0.67 to 0.77 ns an element: 45 to 52 ms for B = 1024, 38 to 42 in bfloat16. An iteration that
  keeps its exponentials costs 16 ms. The last iteration keeps none and costs 10 ms, which is its arithmetic: bfloat16
  takes as long. Narrow tiles cost 3 of the other 6 ms: a tile reads 128 columns of a row, and the next row lies 256 KB
  further on, in the same set of the caches. Prefetching 8 rows ahead saves 2 ms; more rows ahead evict each other.
  Storing the exponentials takes 2 ms, and adding them up 1 ms.
- A tile of 16 columns is the largest whose exponentials fit the second-level cache for 4096 rows. It is twice as slow
  as a tile of 128 columns, whose 2 MB lie in the third-level cache.
- ``sinkhorn_knopp`` of [1024, 65536] float32 is bimodal in a virtual machine that returns free memory to its host.
  Mapping the 268 MB of the result takes 30 ms if the host still backs them, and half a second or more if it does not,
  as slow as the recipe. Pages of 4 KB would always take 130 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import dinov2_kernels as dk

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

K = 65536
TEMPERATURE = 0.07
N_ITERATIONS = 3


def recipe(logits: Tensor) -> Tensor:
    """The textbook form on Q [K, B], as in DINOv2; one process needs no all-reduce."""
    Q = torch.exp(logits.float() / TEMPERATURE).t()
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(N_ITERATIONS):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= B
    Q *= B
    return Q.t()


def compiled_recipe() -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(recipe, dynamic=False)


def sinkhorn_bias(logits: Tensor) -> Tensor:
    return dk.sinkhorn_bias(logits, TEMPERATURE, n_iterations=N_ITERATIONS)


def sinkhorn_knopp(logits: Tensor) -> Tensor:
    return dk.sinkhorn_knopp(logits, TEMPERATURE, n_iterations=N_ITERATIONS)


PEERS = {
    "compiled recipe": compiled_recipe,
    "sinkhorn_bias": lambda: sinkhorn_bias,
    "sinkhorn_knopp": lambda: sinkhorn_knopp,
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16)]


def random_logits(B: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(B, K, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [128, 1024])
@pytest.mark.parametrize("device", DEVICES)
def test_sinkhorn(
    benchmark: BenchmarkFixture, compare: Compare, device: str, B: int, dtype: torch.dtype, peer: str
) -> None:
    benchmark.group = f"Sinkhorn-Knopp of [{B}, {K}] {dtype} on {device}, speedup over the recipe"
    logits = random_logits(B, dtype, device)
    function = PEERS[peer]()
    least_bytes = N_ITERATIONS * logits.nbytes  # for the bias; the assignments need one more read, and a write
    if peer != "sinkhorn_bias":
        least_bytes += logits.nbytes + 4 * logits.numel()
        torch.testing.assert_close(function(logits), recipe(logits), atol=1e-4, rtol=1e-2)
    compare(lambda: function(logits), lambda: recipe(logits), least_bytes=least_bytes, rounds=11 if B == 128 else 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [128, 1024, 4900])
def test_cuda_cpp_beside_triton(benchmark: BenchmarkFixture, compare: Compare, B: int, dtype: torch.dtype) -> None:
    """Find which of the two should serve CUDA tensors: 128 rows are the class tokens of a batch, 4900 the patches."""
    benchmark.group = f"sinkhorn_bias of [{B}, {K}] {dtype} in CUDA C++, speedup over Triton"
    logits = random_logits(B, dtype, "cuda")

    def in_cuda_cpp() -> Tensor:
        with dk.use_backend("native"):
            return sinkhorn_bias(logits)

    torch.testing.assert_close(in_cuda_cpp(), sinkhorn_bias(logits))
    compare(in_cuda_cpp, lambda: sinkhorn_bias(logits), least_bytes=N_ITERATIONS * logits.nbytes, rounds=21)
