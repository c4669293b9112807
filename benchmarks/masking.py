"""Block masks of one batch: the native sampler beside the same algorithm in Python. Times are for 128 masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dinov2.data import MaskConfig, mask_counts, masking_reference
from dinov2_kernels import _host

SAMPLERS = {"native": _host.sample_block_masks, "python": masking_reference.sample_block_masks}
CROPS = 128  # global crops of 64 images; half of them are masked


def arguments(side: int) -> tuple[tuple[int, int, np.ndarray], dict[str, float]]:
    counts = mask_counts(CROPS, side**2, MaskConfig(), np.random.default_rng(0))
    blocks = {"min_patches": 4, "max_patches": side**2 // 2}
    aspects = {"min_log_aspect": math.log(0.3), "max_log_aspect": -math.log(0.3)}
    return (side, side, counts), {"seed": 0, **blocks, **aspects}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("side", [14, 16, 37])
def test_block_masks(benchmark: BenchmarkFixture, side: int, sampler: str) -> None:
    positional, named = arguments(side)
    benchmark.group = f"block masks, {CROPS} crops of {side} x {side} patches"
    masks = benchmark(SAMPLERS[sampler], *positional, **named)
    np.testing.assert_array_equal(masks, SAMPLERS["python"](*positional, **named))
