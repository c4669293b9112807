"""accelerate(model): images per second of ViT-S/14 in timm and in transformers, unchanged and accelerated.

Weights are random, images have 224 pixels (257 tokens), and a training step has stochastic depth 0.3 in every block.

Prediction for two threads of a CPU: the linear layers take 22 M weights x 257 tokens x 2 = 11 GFLOP for an image and
attention 1.2 GFLOP; everything else moves memory. The forward can gain at most the time that PyTorch spends outside the
linear layers, about a fifth. A training step also saves 30 % of the blocks' work: up to 1.4 times faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import tests.conftest  # noqa: F401  lets timm and transformers import beside a CPU build of PyTorch
from dinov2_kernels.integrations import accelerate

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

DROP_RATE = 0.3


def of_timm() -> nn.Module:
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, drop_path_rate=DROP_RATE)
    for block in model.blocks:  # timm's rates grow with depth
        block.drop_path1 = block.drop_path2 = timm.layers.DropPath(DROP_RATE)
    return model


def of_transformers() -> nn.Module:
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, patch_size=14, image_size=224, drop_path_rate=DROP_RATE
    )
    return transformers.Dinov2Model(config)


LIBRARIES = {"timm": of_timm, "transformers": of_transformers}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16)]
BATCH = {"cpu": 8, "cuda": 64}


def forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    model.eval()

    @torch.inference_mode()
    def run() -> object:
        return model(images)

    return run


def training_step(model: nn.Module, images: Tensor) -> Callable[[], object]:
    model.train()

    def run() -> None:
        y = model(images)
        (y if isinstance(y, Tensor) else y.last_hidden_state).float().square().mean().backward()
        model.zero_grad()

    return run


WORK = {"forward": forward, "training step": training_step}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_accelerate(
    benchmark: BenchmarkFixture, compare: Compare, device: str, dtype: torch.dtype, library: str, work: str
) -> None:
    benchmark.group = f"{work} of ViT-S/14 {dtype} on {device}, speedup of the accelerated model over the library's"
    plain = LIBRARIES[library]().to(device, dtype)
    images = torch.randn(BATCH[device], 3, 224, 224).to(device, dtype)
    peers = [WORK[work](model, images) for model in (plain, accelerate(copy.deepcopy(plain)))]
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    compare(peers[1], peers[0], least_bytes=weights, rounds=5)
    images_per_s = BATCH[device] / benchmark.stats.stats.median
    benchmark.extra_info |= {
        "images_per_s": round(images_per_s, 1),
        "images_per_s_as_it_comes": round(images_per_s / benchmark.extra_info["speedup"], 1),
    }
