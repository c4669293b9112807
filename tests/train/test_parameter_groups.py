"""Parameter groups: the reference's table of layerwise rates and its rules of weight decay."""

from __future__ import annotations

import pytest
import torch

from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import build_networks
from dinov2.train.optimization import StepSettings, apply_settings, group_key, parameter_groups


def key_of(name: str, module: str = "backbone", layer_decay: float = 0.9):
    return group_key(module, name, depth=12, layer_decay=layer_decay, patch_embed_lr_scale=0.2)


@pytest.mark.parametrize(
    ("name", "lr_scale"),
    [
        ("cls_token", 0.2542),
        ("pos_embed", 0.2542),
        ("mask_token", 0.2542),
        ("register_tokens", 0.2542),
        ("patch_embed.proj.weight", 0.0508),
        ("patch_embed.proj.bias", 0.0508),
        ("blocks.0.attn.qkv.weight", 0.2824),
        ("blocks.1.attn.qkv.weight", 0.3138),
        ("blocks.11.mlp.fc1.weight", 0.9),
        ("norm.weight", 1.0),
    ],
)
def test_layerwise_rates_of_twelve_blocks(name: str, lr_scale: float) -> None:
    assert key_of(name).lr_scale == pytest.approx(lr_scale, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("blocks.0.attn.qkv.weight", True),
        ("blocks.0.attn.qkv.bias", False),
        ("blocks.0.norm1.weight", False),
        ("blocks.0.ls1.gamma", False),
        ("norm.weight", False),
        ("cls_token", True),
        ("pos_embed", True),
        ("mask_token", True),
        ("register_tokens", True),
        ("patch_embed.proj.weight", True),
        ("patch_embed.proj.bias", False),
    ],
)
def test_what_is_decayed(name: str, decayed: bool) -> None:
    assert key_of(name).weight_decay_scale == (1.0 if decayed else 0.0)


@pytest.mark.parametrize("name", ["last_layer.weight_g", "last_layer.weight_v"])
def test_prototypes_are_decayed_and_frozen_at_first(name: str) -> None:
    key = key_of(name, module="dino_head")
    assert (key.lr_scale, key.weight_decay_scale, key.is_last_layer) == (1.0, 1.0, True)


def test_heads_have_no_layer_decay() -> None:
    key = key_of("mlp.0.weight", module="ibot_head", layer_decay=0.5)
    assert (key.lr_scale, key.is_last_layer) == (1.0, False)


def student() -> torch.nn.ModuleDict:
    vit = ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_register_tokens=1)
    head = HeadConfig(out_dim=8, hidden_dim=8, bottleneck_dim=4)
    return build_networks(vit, head, head)[0]


def test_every_parameter_is_in_exactly_one_group() -> None:
    network = student()
    groups = parameter_groups(network, layer_decay=0.9, patch_embed_lr_scale=0.2)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in network.parameters())
    # embeddings and patch projection, two blocks, norm, heads: decayed and not, and the prototypes
    assert len(groups) == len({(g["lr_scale"], g["weight_decay_scale"], g["is_last_layer"]) for g in groups})


def test_settings_reach_the_groups() -> None:
    groups = parameter_groups(student(), layer_decay=0.9, patch_embed_lr_scale=0.2)
    settings = StepSettings(lr=2.0, last_layer_lr=0.0, weight_decay=0.1, teacher_momentum=1, teacher_temperature=1)
    apply_settings(groups, settings)
    for group in groups:
        assert group["lr"] == (0.0 if group["is_last_layer"] else 2.0 * group["lr_scale"])
        assert group["weight_decay"] == 0.1 * group["weight_decay_scale"]
    assert any(group["is_last_layer"] for group in groups)
