"""Small models with parameters that show mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dinov2.models import VisionTransformer, ViTConfig


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Moves every parameter away from its initial value: biases from 0, norms from 1, LayerScale from 1e-5."""

    def randomize(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(around + 0.2 * noise)
        return module.eval()

    return randomize


@pytest.fixture
def tiny_vit(randomize: Callable[[nn.Module], nn.Module]) -> Callable[..., VisionTransformer]:
    """Makes a model of 2 blocks of width 32 on 4 x 4 patches, with random parameters."""

    def tiny_vit(**fields: Any) -> VisionTransformer:
        defaults = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
        model = randomize(VisionTransformer(ViTConfig(**{**defaults, **fields})))
        assert isinstance(model, VisionTransformer)
        return model

    return tiny_vit
