"""Attention over packed crops beside ``F.scaled_dot_product_attention`` on dense batches of the same data.

FLOPs of N tokens in one head of width D: 4 N² D forward, 10 N² D backward (five products; the forward pass has already
computed one of them). Least bytes, with e per element: 4 N D e forward, 8 N D e backward. Each direction computes N²
exponentials.

Prediction for two cores with AVX-512 at about 3 GHz and D = 64. There a large matrix product reaches 189 GFLOP/s in
float32 and 403 in bfloat16 (one instruction of 16 multiply-adds, or of 32, per cycle and core).

- Keys come in whole vectors of 16, so Q K^T computes 64 columns for N = 50 and 272 for N = 257. An exponential with the
  maximum and the sum takes about 1 cycle, so a vector of 16 takes 16 cycles.
- float32, N = 50: 12,800 cycles for Q K^T, 10,000 for P V, 3,200 for exponentials, 3,000 for packing: 640,000 FLOPs in
  29,000 cycles, 130 GFLOP/s while everything is in cache. N = 257: 155. SDPA: 52 and 124; so 2.5 and 1.25 times faster.
- bfloat16: the products take half the cycles, the exponentials do not. N = 50: 215 GFLOP/s, N = 257: 290; SDPA is at 34
  and 107, so 6 and 2.7 times faster. Backward has more products per exponential, and gains a little more.
- float16 has no dot products here, and runs at the speed of float32.

Prediction for two cores with AMX (results/2026-11-27, an Intel Xeon). Its dot products of bf16 run no faster than
float32: without tiles N = 197 takes 22.8 ms forward, while SDPA, which uses tiles, takes 13.4 ms. For one head, tiles
take 2 x 13 x 13 x 2 instructions of 16 cycles, 11,000 cycles, and exponentials take 39,000 cycles. So forward takes 8
ms and is 1.7 times as fast as SDPA.

Measured there: 6.6 to 7.3 ms, 1.8 to 1.9 times as fast as SDPA; faster than SDPA at each shape in each dtype.

Measured (results/2026-11-25): faster than SDPA at each shape in the table of docs/operators/attention.md, 1.1 to 1.8
times in float32, 1.9 to 5.5 in bfloat16 and 2.2 to 10 in float16. What the prediction missed:

- float32, N = 50 is 1.4 to 2.3 times faster instead of 2.5, depending on the run. A run took 23 ms while the machine
  was calm: 10.5 for products, 5.5 for waiting for tokens of 256 bytes from all over memory, 2 for exponentials, 1.2 for
  mapping the result and 1 for writing it. Prefetching the next head's tokens reduces this to 20 ms; with everything in
  cache it would be 14.6 ms. The prefetch goes to the second-level cache, in three parts of a block of queries. A
  prefetch to the first-level cache gained about half as much, and little or nothing when it came in one part.
- For the same shape, writing past the caches gains 2% more, and blocks of 12, 30 or 54 queries instead of 24 gain
  nothing.
- bfloat16, N = 50: 2.9 to 3.9 times in the forward pass, for the same reason.
- float16 gains more than bfloat16, because SDPA's own is slower still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import dinov2_kernels as dk
from dinov2_kernels import PackedLayout

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

DTYPES = [
    pytest.param(dtype, id=str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
# S sequences of N tokens in H heads of width D: local and global crops, evaluation, high resolution, wider heads.
SHAPES = [
    (512, 50, 6, 64),
    (64, 257, 6, 64),
    (64, 197, 6, 64),
    (8, 785, 6, 64),
    (3, 1374, 6, 64),
    (64, 197, 6, 80),
    (32, 197, 6, 96),
    (32, 197, 6, 128),
]


class Batch:
    """The same random data, packed and dense, with both ways to compute attention."""

    def __init__(self, S: int, N: int, H: int, D: int, dtype: torch.dtype, backward: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layout = PackedLayout([(S, N)])
        self.qkv = torch.randn(S * N, 3, H, D, generator=generator).to(dtype)  # [T, 3, H, D]
        dense = (x.contiguous().unflatten(0, (S, N)).transpose(1, 2) for x in self.qkv.unbind(1))
        self.dense = [x.requires_grad_(backward) for x in dense]  # q, k, v [S, H, N, D], views of [S, N, H, D]
        self.qkv.requires_grad_(backward)
        self.grad = torch.randn(S * N, H, D, generator=generator).to(dtype) if backward else None  # [T, H, D]
        self.dense_grad = self.grad.unflatten(0, (S, N)).transpose(1, 2) if self.grad is not None else None

    def packed_attention(self) -> Tensor:
        out = dk.varlen_attention_qkvpacked(self.qkv, self.layout)
        if self.grad is not None:
            torch.autograd.grad(out, self.qkv, self.grad)
        return out

    def dense_attention(self) -> Tensor:
        out = F.scaled_dot_product_attention(*self.dense)
        if self.dense_grad is not None:
            torch.autograd.grad(out, self.dense, self.dense_grad)
        return out


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "S{}-N{}-H{}-D{}".format(*shape))
def test_attention(
    benchmark: BenchmarkFixture, compare: Compare, shape: tuple[int, ...], dtype: torch.dtype, backward: bool
) -> None:
    S, N, H, D = shape
    passes = "forward and backward" if backward else "forward"
    benchmark.group = f"attention {passes}, {S} sequences of {N}, {H} heads of {D}, {dtype}, speedup over SDPA"
    batch = Batch(S, N, H, D, dtype, backward)
    expected = batch.dense_attention().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(batch.packed_attention(), expected, atol=2e-2, rtol=2e-2)
    compare(
        batch.packed_attention,
        batch.dense_attention,
        least_bytes=(12 if backward else 4) * S * N * H * D * dtype.itemsize,
        flops=(14 if backward else 4) * S * N * N * H * D,
        rounds=11,
    )
