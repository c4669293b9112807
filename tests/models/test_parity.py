"""The model computes what transformers' and timm's do, from files that they wrote, and they load ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import transformers
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from dinov2.models import VisionTransformer, load_pretrained, save_pretrained

TRANSFORMERS = {
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
    "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
}
TIMM = {
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_giant_patch14_dinov2": {"mlp_layer": SwiGLUPacked},
    "vit_giant_patch14_reg4_dinov2": {"mlp_layer": SwiGLUPacked},
}
SIZES = [(70, 70), (56, 98), (28, 42), (112, 112)]


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))


def assert_same_tokens(model: VisionTransformer, x: Tensor, expected: Tensor) -> None:
    """Compare all tokens [B, 1 + R + N, D] after the last norm."""
    with torch.no_grad():
        features = model.eval().forward_features(x)
    parts = ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens")
    tokens = torch.cat([features[part].view(len(x), -1, expected.shape[-1]) for part in parts], dim=1)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=[(kind, swiglu) for kind in TRANSFORMERS for swiglu in (False, True)], ids=str)
def of_transformers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    kind, swiglu = request.param
    config_class, model_class = TRANSFORMERS[kind]
    config = config_class(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=70,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    torch.manual_seed(0)
    model = randomized(model_class(config))
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    return model, folder


def randomized(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transformers(of_transformers: tuple[Any, Path], size: tuple[int, int]) -> None:
    theirs, folder = of_transformers
    x = images(size)
    with torch.no_grad():
        expected = theirs(x).last_hidden_state
    assert_same_tokens(load_pretrained(folder), x, expected)


def test_masks_of_transformers(of_transformers: tuple[Any, Path]) -> None:
    theirs, folder = of_transformers
    x, mask = images((70, 70)), torch.rand(2, 25, generator=torch.Generator().manual_seed(0)) < 0.4
    with torch.no_grad():
        expected = theirs(x, bool_masked_pos=mask).last_hidden_state
        features = load_pretrained(folder).eval().forward_features(x, mask)
    torch.testing.assert_close(features["x_norm_clstoken"], expected[:, 0], rtol=0, atol=1e-5)


def test_gradients_of_transformers(of_transformers: tuple[Any, Path]) -> None:
    theirs, folder = of_transformers
    ours, x = load_pretrained(folder), images((56, 98))
    theirs.zero_grad()
    theirs(x).last_hidden_state[:, 0].square().sum().backward()
    ours(x).square().sum().backward()
    embeddings = theirs.embeddings
    pairs = [
        (ours.pos_embed, embeddings.position_embeddings),
        (ours.patch_embed.proj.weight, embeddings.patch_embeddings.projection.weight),
        (ours.norm.weight, theirs.layernorm.weight),
    ]
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_classifier_of_transformers_is_left_out(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=28)
    theirs = randomized(transformers.Dinov2ForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    x = images((28, 28))
    with torch.no_grad():
        expected = theirs.dinov2(x).last_hidden_state
    model = load_pretrained(tmp_path)
    assert model.config.num_heads == 4
    assert_same_tokens(model, x, expected)


def timm_model(name: str) -> Any:
    return timm.create_model(
        name, img_size=70, depth=2, embed_dim=48, num_heads=4, num_classes=0, dynamic_img_size=True, **TIMM[name]
    )


@pytest.fixture(scope="module", params=TIMM)
def of_timm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = randomized(timm_model(request.param))
    folder = tmp_path_factory.mktemp(request.param)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": request.param, "num_classes": 0, "model_args": {"num_heads": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_timm(of_timm: tuple[Any, Path], size: tuple[int, int]) -> None:
    theirs, folder = of_timm
    x = images(size)
    with torch.no_grad():
        expected = theirs.forward_features(x)
    assert_same_tokens(load_pretrained(folder), x, expected)


@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_our_files(name: str, tmp_path: Path, tiny_vit: Callable[..., VisionTransformer]) -> None:
    model = tiny_vit(
        img_size=70,
        embed_dim=48,
        num_heads=4,
        num_register_tokens=4 if "reg4" in name else 0,
        ffn="swiglu" if "giant" in name else "mlp",
    )
    file = save_pretrained(model, tmp_path) / "model.safetensors"
    theirs = timm_model(name).eval()
    theirs.load_state_dict(checkpoint_filter_fn(safetensors.torch.load_file(file), theirs))
    x = images((56, 98))
    with torch.no_grad():
        expected = theirs.forward_features(x)
    assert_same_tokens(model, x, expected)
