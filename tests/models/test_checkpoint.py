"""Files of weights: round trips, facebook's variants, loading for another image size, and broken files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dinov2.models import VisionTransformer, ViTConfig, load_pretrained, save_pretrained

TinyViT = Callable[..., VisionTransformer]
WIDE = {"embed_dim": 128}  # two heads of width 64: what shapes alone can tell


def assert_same_weights(model: VisionTransformer, expected: VisionTransformer) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_register_tokens": 2, "ffn": "swiglu", "init_values": None, "drop_path_rate": 0.2, "qkv_bias": False}],
    ids=str,
)
def test_round_trip(tiny_vit: TinyViT, tmp_path: Path, fields: dict[str, Any]) -> None:
    model = tiny_vit(**fields)
    assert save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    for path in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder" / "model.safetensors")):
        loaded = load_pretrained(path)
        assert loaded.config == model.config
        assert_same_weights(loaded, model)
        assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_files_on_disk(tiny_vit: TinyViT, tmp_path: Path) -> None:
    model = tiny_vit(num_register_tokens=2)
    save_pretrained(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(safetensors.torch.load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["num_register_tokens"] == 2


def test_saving_over_the_files_a_model_came_from(tiny_vit: TinyViT, tmp_path: Path) -> None:
    save_pretrained(tiny_vit(), tmp_path)
    model = load_pretrained(tmp_path)
    with torch.no_grad():
        model.cls_token.fill_(3.0)
    save_pretrained(model, tmp_path)
    assert_same_weights(load_pretrained(tmp_path), model)


def in_chunks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As models with ``block_chunks=2`` name 4 blocks: the chunk before the block's number."""

    def chunked(match: re.Match[str]) -> str:
        return f"blocks.{int(match[1]) // 2}.{match[1]}."

    return {re.sub(r"^blocks\.(\d+)\.", chunked, name): tensor for name, tensor in weights.items()}


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


HEADS = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_g": torch.zeros(2, 1)}
FACEBOOK_FILES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda weights: weights,
    "in chunks": in_chunks,
    "teacher checkpoint": lambda weights: {"teacher": under("backbone.", weights) | HEADS},
    "teacher checkpoint in chunks": lambda weights: {"teacher": under("backbone.", in_chunks(weights)) | HEADS},
    "training checkpoint": lambda weights: {
        "model": under("teacher.backbone.", weights)
        | under("student.backbone.", {name: tensor + 1 for name, tensor in weights.items()})
        | {"dino_loss.center": torch.zeros(1, 2)},
        "iteration": 5,
    },
}


@pytest.mark.parametrize("wrap", FACEBOOK_FILES.values(), ids=FACEBOOK_FILES)
@pytest.mark.parametrize("registers", [0, 4])
def test_facebook_files(tiny_vit: TinyViT, tmp_path: Path, wrap: Callable[..., Any], registers: int) -> None:
    model = tiny_vit(**WIDE, depth=4, num_register_tokens=registers)
    torch.save(wrap(dict(model.state_dict())), tmp_path / "weights.pth")
    loaded = load_pretrained(tmp_path / "weights.pth")
    assert_same_weights(loaded, model)
    offset, antialias = (0.0, True) if registers else (0.1, False)
    expected = replace(model.config, interpolate_offset=offset, interpolate_antialias=antialias)
    assert loaded.config == expected


@pytest.mark.parametrize("hidden", [344, 88, 96, 600])
def test_width_of_swiglu_from_shapes(tiny_vit: TinyViT, tmp_path: Path, hidden: int) -> None:
    model = tiny_vit(**WIDE, ffn="swiglu", mlp_ratio=1.5 * hidden / 128)
    assert model.blocks[0].mlp.w3.weight.shape == (128, hidden)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert_same_weights(load_pretrained(tmp_path / "weights.pth"), model)


def test_half_precision_weights_become_float32(tiny_vit: TinyViT, tmp_path: Path) -> None:
    model = tiny_vit(**WIDE).half()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert_same_weights(load_pretrained(tmp_path / "weights.pth"), model.float())


@pytest.mark.parametrize(("offset", "antialias"), [(0.0, True), (0.1, False)])
def test_loading_for_another_image_size(tiny_vit: TinyViT, tmp_path: Path, offset: float, antialias: bool) -> None:
    """The smaller model computes what the larger one does on small images."""
    fields = {**WIDE, "interpolate_offset": offset, "interpolate_antialias": antialias}
    large, small = tiny_vit(img_size=98, **fields), tiny_vit(img_size=56, **fields)
    save_pretrained(large, tmp_path)
    assert load_pretrained(tmp_path, small) is small
    x = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(small.forward_features(x), large.forward_features(x))


def test_a_given_model_keeps_its_dtype(tiny_vit: TinyViT, tmp_path: Path) -> None:
    save_pretrained(tiny_vit(), tmp_path)
    assert load_pretrained(tmp_path, tiny_vit().double()).cls_token.dtype == torch.float64


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        load_pretrained(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"the folder holds none of model.safetensors, pytorch_model.bin"):
        load_pretrained(tmp_path)


class NotWeights:
    """An object that only an unsafe unpickler would build."""


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "model.safetensors"])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match=rf"{name}: cannot be read as a file of weights"):
        load_pretrained(tmp_path / name)


def test_truncated_file(tiny_vit: TinyViT, tmp_path: Path) -> None:
    file = save_pretrained(tiny_vit(), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read as a file of weights"):
        load_pretrained(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": NotWeights()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        load_pretrained(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected tensors by name, got list"),
        ({}, "expected a DINOv2 model of facebook, transformers or timm, got tensors none"),
        ({"conv1.weight": torch.zeros(1)}, "expected a DINOv2 model .*, got tensors conv1.weight"),
    ],
    ids=str,
)
def test_other_content(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights.pth: {message}"):
        load_pretrained(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc2.weight", "blocks.1.norm1.weight", "norm.bias"])
def test_a_lost_tensor_is_named(tiny_vit: TinyViT, tmp_path: Path, name: str) -> None:
    weights = dict(tiny_vit(**WIDE).state_dict())
    del weights[name]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights.pth: the weights .*(lack|no) {re.escape(name)}"):
        load_pretrained(tmp_path / "weights.pth")


def test_a_model_of_another_architecture(tiny_vit: TinyViT, tmp_path: Path) -> None:
    save_pretrained(tiny_vit(depth=3), tmp_path)
    with pytest.raises(ValueError, match=r"do not fit the model: unexpected blocks.2.* and 9 more differences"):
        load_pretrained(tmp_path, tiny_vit())
    message = r"do not fit the model: cls_token of shape \[1, 1, 32\] for \[1, 1, 128\]"
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path, tiny_vit(depth=3, **WIDE))


def test_heads_that_shapes_do_not_tell(tiny_vit: TinyViT, tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"a width of 32 does not tell the number of heads; config.json must"):
        load_pretrained(tmp_path / "weights.pth")


def test_broken_configuration(tiny_vit: TinyViT, tmp_path: Path) -> None:
    save_pretrained(tiny_vit(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.safetensors: config.json beside it cannot be used: Expecting"):
        load_pretrained(tmp_path)
    fields = {"model_type": "dinov2_vision_transformer", "depth": 2, "colour": "red"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"model.safetensors: config.json beside it cannot be used: .*colour"):
        load_pretrained(tmp_path)


def test_configuration_without_defaults_survives(tmp_path: Path) -> None:
    config = ViTConfig(img_size=30, patch_size=10, in_chans=5, embed_dim=24, depth=1, num_heads=3, mlp_ratio=2.5)
    save_pretrained(VisionTransformer(config), tmp_path)
    assert load_pretrained(tmp_path).config == config
