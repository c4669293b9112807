"""Crops of two sizes in one packed pass through ViT-S/16, beside a pass for each size: forward and backward.

Both run the same kernels on the same weights. B = 4 images in 2 global crops of 224 and 8 local ones of 96 pixels make
8 sequences of 197 tokens and 32 of 37, 2760 tokens in all.

Prediction: both compute the same products, 0.37 TFLOP. A packed product has all rows at once, so each weight is read
once and not twice, and each of some 150 operators is called once. This gains one or two per cent on a CPU. Packing
copies the tokens once in each direction, 8 MB beside some 1.5 GB that the pass moves. So 1.0 times as fast, or a little
more.

Measured (results/2026-11-25): 1.03 times as fast in float32, with and without drop path, 1.04 and 1.08 in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dinov2.models import vit_small

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

B, LOCAL_CROPS = 4, 8


def passes(drop_path: float, bf16: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """The packed pass, and a pass for each size."""
    torch.manual_seed(0)
    vit = vit_small(patch_size=16, drop_path_rate=drop_path)
    crops = [torch.randn(2 * B, 3, 224, 224), torch.randn(LOCAL_CROPS * B, 3, 96, 96)]
    masks = [torch.rand(2 * B, 196) < 0.15, None]

    def run(groups: list[tuple[list[torch.Tensor], list[torch.Tensor | None]]]) -> None:
        vit.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = [output for group in groups for output in vit.forward_features(*group)]
        loss = sum(output["x_norm_clstoken"].square().mean() for output in outputs)
        loss = loss + outputs[0]["x_norm_patchtokens"].square().mean()
        loss.backward()

    return lambda: run([(crops, masks)]), lambda: run(
        [([crop], [mask]) for crop, mask in zip(crops, masks, strict=True)]
    )


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_packed(benchmark: BenchmarkFixture, compare: Compare, bf16: bool, drop_path: float) -> None:
    benchmark.group = f"crops of two sizes packed, {'bfloat16' if bf16 else 'float32'}, speedup over a pass for each"
    packed, apart = passes(drop_path, bf16)
    compare(packed, apart, least_bytes=0, rounds=7)
