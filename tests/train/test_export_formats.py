"""Folders for transformers and timm: their own loaders read them, and the models compute what ours does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

from dinov2.models import VisionTransformer, ViTConfig, load_pretrained, save_pretrained
from dinov2.train.networks import export

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"num_register_tokens": 3},
    "gated": {"ffn": "swiglu", "num_register_tokens": 2},
    "bare": {"init_values": None, "qkv_bias": False, "in_chans": 4},
}


@pytest.fixture(params=MODELS)
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[VisionTransformer, Path]:
    torch.manual_seed(0)
    fields = {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 4, **MODELS[request.param]}
    model = VisionTransformer(ViTConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model, save_pretrained(model, tmp_path / "ours")


def tokens(model: VisionTransformer, x: Tensor) -> Tensor:
    features = model.forward_features(x)
    class_token = features["x_norm_clstoken"].unsqueeze(1)
    return torch.cat([class_token, features["x_norm_regtokens"], features["x_norm_patchtokens"]], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("format", ["transformers", "timm"])
def test_another_library_computes_the_same(ours: tuple[VisionTransformer, Path], format: str, tmp_path: Path) -> None:
    model, folder = ours
    output = export(folder, tmp_path / format, format=format)
    x = torch.randn(2, model.config.in_chans, 56, 56)
    if format == "timm":
        theirs = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
        actual = theirs.forward_features(x)
    else:
        theirs, report = transformers.AutoModel.from_pretrained(output, output_loading_info=True)
        assert not any(report.values())
        actual = theirs.eval()(x).last_hidden_state
    torch.testing.assert_close(actual, tokens(model, x), rtol=0, atol=1e-5)
    again = load_pretrained(output).eval()
    assert again.config.num_heads == 4
    torch.testing.assert_close(tokens(again, x), tokens(model, x), rtol=0, atol=1e-5)
    if format == "timm":
        larger = torch.randn(2, model.config.in_chans, 84, 70)
        torch.testing.assert_close(tokens(again, larger), theirs.forward_features(larger), rtol=0, atol=1e-5)


def test_models_that_others_lack(tmp_path: Path) -> None:
    def refused(format: str, message: str, **fields: Any) -> None:
        model = VisionTransformer(ViTConfig(img_size=28, embed_dim=64, depth=1, num_heads=1, **fields))
        folder = save_pretrained(model, tmp_path / format / "ours")
        with pytest.raises(ValueError, match=message):
            export(folder, tmp_path / format / "theirs", format=format)
        assert not (tmp_path / format / "theirs").exists()

    refused("transformers", r"transformers has no model with mlp_ratio 2\.5, only with 2", mlp_ratio=2.5)
    refused("timm", "timm has no model with ffn_bias False, only with True", ffn_bias=False)
