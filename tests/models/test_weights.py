"""Weights with heads: facebook's checkpoints and our folders, and what does not fit another architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.models import (
    DINOHead,
    HeadConfig,
    VisionTransformer,
    ViTConfig,
    Weights,
    load_pretrained,
    read_weights,
    save_heads,
    save_pretrained,
)
from dinov2.models.checkpoints.weights import check_architecture, head_config_of

TinyViT = Callable[..., VisionTransformer]


def tensors_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "config", [HeadConfig(7, 6, 5, 3), HeadConfig(7, 6, 5, 2), HeadConfig(7, bottleneck_dim=5, num_layers=1)], ids=str
)
def test_sizes_of_a_head_from_its_tensors(config: HeadConfig) -> None:
    head = DINOHead(8, config.out_dim, config.hidden_dim, config.bottleneck_dim, config.num_layers)
    assert head_config_of(head.state_dict()) == config


@pytest.mark.parametrize("key", ["teacher", "model"])
def test_heads_of_a_training_checkpoint(tiny_vit: TinyViT, tmp_path: Path, key: str) -> None:
    """As facebook's training writes it: ``teacher_checkpoint.pth``, and the whole model with student and centres."""
    model, heads = tiny_vit(embed_dim=128), {"dino_head": DINOHead(128, 6, 5, 4), "ibot_head": DINOHead(128, 9, 5, 4)}
    content = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    for head, module in heads.items():
        content |= {f"{head}.{name}": tensor for name, tensor in module.state_dict().items()}
    if key == "model":
        student = {f"student.{name}": tensor + 1 for name, tensor in content.items()}
        teacher = {f"teacher.{name}": tensor for name, tensor in content.items()}
        content = (
            student | teacher | {"dino_loss.center": torch.ones(1, 6), "ibot_patch_loss.center": torch.ones(1, 1, 9)}
        )
    torch.save({key: content}, tmp_path / "weights.pth")
    weights = read_weights(tmp_path / "weights.pth")
    assert tensors_equal(weights.backbone, model.state_dict())
    for head, module in heads.items():
        assert tensors_equal(weights.heads[head], module.state_dict())
    assert sorted(weights.centers) == (["dino_loss.center", "ibot_patch_loss.center"] if key == "model" else [])
    network = weights.network()
    assert list(network) == ["backbone", "dino_head", "ibot_head"]
    assert tensors_equal(network.state_dict(), weights.named_tensors())


def test_a_folder_with_heads(tiny_vit: TinyViT, tmp_path: Path) -> None:
    model, head = tiny_vit(), DINOHead(32, 6, 5, 4)
    weights = Weights(
        "a test",
        model.config,
        dict(model.state_dict()),
        {"dino_head": dict(head.state_dict())},
        {"dino_loss.center": torch.arange(6.0), "ibot_patch_loss.center": torch.arange(6.0)},
    )
    save_pretrained(model, tmp_path)
    assert read_weights(tmp_path).heads == {}
    save_heads(weights, tmp_path)
    read = read_weights(tmp_path)
    assert read.vit == model.config
    assert tensors_equal(read.heads["dino_head"], weights.heads["dino_head"])
    assert {name: list(center.shape) for name, center in read.centers.items()} == {
        "dino_loss.center": [1, 6],
        "ibot_patch_loss.center": [1, 1, 6],
    }
    assert tensors_equal(load_pretrained(tmp_path).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="nothing has no heads"):
        save_heads(replace(weights, origin="nothing", heads={}), tmp_path)


def test_position_embeddings_for_another_image_size(tiny_vit: TinyViT) -> None:
    """What the model itself would use on such images, in the way that it resamples."""
    for fields in ({}, {"interpolate_offset": 0.1, "interpolate_antialias": False}):
        model = tiny_vit(**fields)
        weights = Weights("a test", model.config, dict(model.state_dict()))
        smaller = tiny_vit(img_size=28)
        smaller.load_state_dict(weights.backbone_for(smaller.config))
        x = torch.randn(2, 3, 28, 28)
        torch.testing.assert_close(smaller(x), model(x))


def test_every_field_that_does_not_fit_is_named() -> None:
    theirs = ViTConfig(embed_dim=64, num_heads=1, depth=2, init_values=None)
    with pytest.raises(ValueError, match="weights of x do not fit the model: ") as error:
        check_architecture(theirs, ViTConfig(), "x")
    assert "embed_dim is 64 there, not 384, depth is 2 there, not 12" in str(error.value)
    assert str(error.value).endswith("set --vit.embed_dim 64 --vit.depth 2 --vit.num_heads 1 --vit.init_values None")


def test_what_changes_no_weight_fits() -> None:
    theirs = ViTConfig(img_size=518, init_values=1.0, interpolate_offset=0.1, interpolate_antialias=False)
    check_architecture(theirs, ViTConfig(drop_path_rate=0.3), "x")
    gated = ViTConfig(ffn="swiglu", mlp_ratio=4.0)
    check_architecture(gated, replace(gated, mlp_ratio=4.001), "x")
    with pytest.raises(ValueError, match=r"mlp_ratio is 4\.0 there, not 3\.0"):
        check_architecture(gated, replace(gated, mlp_ratio=3.0), "x")
