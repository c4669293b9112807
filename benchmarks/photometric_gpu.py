"""The photometric augmentation of a batch of crops on a GPU: the definition in eager PyTorch, kornia, and ours.

Prediction (no GPU has run this yet), for an H200 that moves 4.3 TB/s, and plans of DINOv2's distribution with half of
the images blurred:

- Floor: 3 bytes a pixel read and 6 (bfloat16) written. Ours also reads 3 bytes from L2 for eight images of ten. For the
  blurred half it writes 12 and reads 15 bytes: 9 + 0.5 * 27 = 22.5 bytes a pixel of memory at most. 256 images of 224
  pixels are 12.8 million pixels: 0.12 GB and 0.03 ms at the floor; 0.29 GB and 0.07 ms by this count. A pixel takes
  about 200 instructions, 0.06 ms on 132 multiprocessors, partly while memory moves: 0.1 to 0.15 ms.
- 512 images of 96 pixels are 4.7 million pixels: 0.03 to 0.06 ms, of which three launches take a third.
- The definition runs some thirty kernels for each image: 256 images are 8000 launches of 5 us, 40 ms and more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.photometric import kornia, smooth_images
from dinov2_kernels import PhotometricDistribution, draw_plan, photometric
from dinov2_kernels.photometric import reference
from tests.photometric.cases import MEAN, STD

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

PREDICTED = {224: 0.13e-3, 96: 0.05e-3}  # seconds


@pytest.mark.parametrize("peer", [pytest.param("kornia", marks=pytest.mark.slow_to_build), "photometric"])
@pytest.mark.parametrize(("N", "side"), [(256, 224), (512, 96)])
def test_photometric(benchmark: BenchmarkFixture, compare: Compare, N: int, side: int, peer: str) -> None:
    benchmark.group = f"photometric augmentation of [{N}, {side}, {side}, 3], speedup over the definition"
    images = smooth_images(N, side, "cuda")
    plan = draw_plan(PhotometricDistribution(solarize=0.1), [np.random.default_rng((0, n)) for n in range(N)])
    plans, on_device = plan.images(), plan.to("cuda")
    functions = {
        "kornia": lambda: kornia(images, plans),
        "photometric": lambda: photometric(images, on_device, mean=MEAN, std=STD, dtype=torch.bfloat16),
    }
    compare(
        functions[peer],
        lambda: reference.photometric(images, on_device.table, MEAN, STD, torch.bfloat16),
        least_bytes=N * side * side * 9,
        rounds=5,
        predicted=PREDICTED[side] if peer == "photometric" else None,
    )
