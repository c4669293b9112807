"""The last layer of DINO's head and its loss on a GPU in bfloat16, beside the recipe in eager PyTorch and compiled.

Two parts of a step with 64 images per GPU and 65536 prototypes of 256 features: 512 local crops, each against two of
128 class tokens of the teacher, and 4900 masked patches, each against its own.

Prediction for an H200 (products at 600 TFLOP/s, 4.3 TB/s), no GPU having run this yet; NK is the number of the
student's logits:

- Local crops, all prototypes in one chunk: four products of 17 GFLOP, 0.11 ms. The logits and targets of the chunk are
  written and read, forward and backward together 30 NK bytes, 1.0 GB, 0.25 ms; weight normalisation and its gradient
  move 1.7 GB, 0.4 ms. So 0.8 ms. The recipe: three products, some 80 NK bytes, and 1.3 GB for the weight: 1.0 ms.
- Masked patches in 8 chunks: four products of 164 GFLOP, 1.1 ms; 36 NK bytes, 11.6 GB, 2.7 ms; 4.8 to 5 ms with the
  weight's part. The recipe: 0.8 ms of products, 80 NK bytes, 26 GB, 6 ms: 7.1 ms. So 1.5 times faster, with 0.5 GB of
  memory in place of 9.
- Compiled, the recipe moves some 30 NK bytes: a par in time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import gpu
from benchmarks.prototype_cross_entropy import PEERS, D, Head, K, recipe

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

PREDICTED = {512: 0.8e-3, 4900: 4.9e-3}  # seconds


def local_crops() -> Head:
    """Crop-major, as batches are: image i of every crop against both its global crops."""
    image = torch.arange(512)[:, None] % 64
    return Head(512, 128, torch.bfloat16, torch.cat([image, image + 64], dim=1), "cuda")


def masked_patches() -> Head:
    return Head(4900, 4900, torch.bfloat16, None, "cuda")


@pytest.mark.parametrize("peer", gpu.slow_to_build(["compiled recipe", "prototype_cross_entropy"]))
@pytest.mark.parametrize("part", [local_crops, masked_patches], ids=["local crops", "masked patches"])
def test_prototype_cross_entropy(benchmark: BenchmarkFixture, compare: Compare, part: object, peer: str) -> None:
    head, function = part(), PEERS[peer]()  # type: ignore[operator]
    N = len(head.features)
    benchmark.group = f"{N} rows over {K} prototypes, forward and backward, in a CUDA graph, speedup over the recipe"
    torch.testing.assert_close(head.loss(function), head.loss(recipe), atol=1e-2, rtol=1e-2)
    least_bytes = head.teacher_logits.nbytes + 2 * head.weight.nbytes
    steps = [gpu.as_graph(head.training_step(f)) for f in (function, recipe)]
    predicted = PREDICTED[N] if peer == "prototype_cross_entropy" else None
    compare(*steps, least_bytes=least_bytes, flops=3 * 2 * N * K * D, rounds=15, predicted=predicted)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    head.training_step(function)()
    benchmark.extra_info["extra_peak_MB"] = round((torch.cuda.max_memory_allocated() - held) / 1e6)
