"""Recipes: the published table, field by field; every recipe is complete; an unknown name gets a suggestion."""

from __future__ import annotations

import inspect
import math

import pytest

from dinov2.recipes import RECIPES, recipe

# arch, patch, ffn | drop path | dino K, bottleneck | ibot K, bottleneck | centring | batch | steps | base_lr, lr |
# warm-up steps | weight decay end | momentum | layer decay | temperature warm-up, frozen steps | local crop
PUBLISHED = {
    "vitl16_short": {
        "arch": (1024, 24, 16, 16, "mlp"),
        "drop_path": 0.3,
        "dino_head": (65536, 256),
        "ibot_head": None,
        "centering": "softmax",
        "batch": (2048, 64),
        "steps": 100 * 1250,
        "lr": (4e-3, 5.66e-3),
        "warmup_steps": 10 * 1250,
        "weight_decay": (0.04, 0.4),
        "momentum": (0.992, 1.0),
        "layer_decay": 0.9,
        "local_size": 96,
    },
    "vitl14": {
        "arch": (1024, 24, 16, 14, "swiglu"),
        "drop_path": 0.4,
        "dino_head": (131072, 384),
        "ibot_head": (131072, 256),
        "centering": "sinkhorn_knopp",
        "batch": (3072, 32),
        "steps": 500 * 1250,
        "lr": (2e-4, 3.46e-4),
        "warmup_steps": 80 * 1250,
        "weight_decay": (0.04, 0.2),
        "momentum": (0.994, 1.0),
        "layer_decay": 1.0,
        "local_size": 98,
    },
}
PUBLISHED["vitb14"] = PUBLISHED["vitl14"] | {"arch": (768, 12, 12, 14, "mlp"), "drop_path": 0.2, "batch": (3072, 64)}
PUBLISHED["vits14"] = PUBLISHED["vitl14"] | {"arch": (384, 12, 6, 14, "mlp"), "drop_path": 0.1, "batch": (3072, 128)}
PUBLISHED["vitg14"] = PUBLISHED["vitl14"] | {"arch": (1536, 40, 24, 14, "swiglu"), "batch": (3072, 12)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table(name: str) -> None:
    config, row = recipe(name), PUBLISHED[name]
    vit, optim, teacher, views = config.vit, config.optim, config.teacher, config.data.augmentation
    ibot = config.ibot_head
    assert {
        "arch": (vit.embed_dim, vit.depth, vit.num_heads, vit.patch_size, vit.ffn),
        "drop_path": vit.drop_path_rate,
        "dino_head": (config.dino_head.out_dim, config.dino_head.bottleneck_dim),
        "ibot_head": ibot and (ibot.out_dim, ibot.bottleneck_dim),
        "centering": config.objective.centering,
        "batch": (config.batch_size, config.micro_batch_size),
        "steps": config.steps,
        "lr": (optim.base_lr, pytest.approx(optim.base_lr * math.sqrt(config.batch_size / 1024), rel=2e-3)),
        "warmup_steps": round(optim.warmup_fraction * config.steps),
        "weight_decay": (optim.weight_decay, optim.weight_decay_end),
        "momentum": (teacher.momentum, teacher.momentum_end),
        "layer_decay": optim.layer_decay,
        "local_size": views.local_size,
    } == row


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_published_runs_share(name: str) -> None:
    config = recipe(name)
    vit, views, objective, masks = config.vit, config.data.augmentation, config.objective, config.data.masks
    assert (vit.img_size, vit.init_values, vit.drop_path_uniform, vit.num_register_tokens) == (224, 1e-5, True, 0)
    assert (vit.interpolate_antialias, vit.interpolate_offset) == (True, 0.0)
    for head in filter(None, (config.dino_head, config.ibot_head)):
        assert (head.hidden_dim, head.num_layers) == (2048, 3)
    assert (views.global_size, views.global_scale, views.local_scale) == (224, (0.32, 1.0), (0.05, 0.32))
    assert (views.local_crops, views.blur) == (8, "released")
    assert (masks.probability, masks.ratio) == (0.5, (0.1, 0.5))
    assert (objective.dino_weight, objective.ibot_weight, objective.koleo_weight) == (1, 1, 0.1)
    assert objective.student_temperature == 0.1
    optim, teacher = config.optim, config.teacher
    assert (optim.beta1, optim.beta2, optim.clip_grad_norm) == (0.9, 0.999, 3.0)
    assert (optim.min_lr, optim.patch_embed_lr_scale) == (1e-6, 0.2)
    assert (teacher.temperature_start, teacher.temperature) == (0.04, 0.07)
    assert round(teacher.temperature_warmup_fraction * config.steps) == 30 * 1250
    assert round(optim.freeze_last_layer_fraction * config.steps) == 1250


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_described_and_consistent(name: str) -> None:
    config = recipe(name)
    assert config.output.name == name
    assert (inspect.getdoc(RECIPES[name]) or "").splitlines()[0].endswith(".")
    views, vit = config.data.augmentation, config.vit
    assert views.global_size % vit.patch_size == views.local_size % vit.patch_size == 0
    assert vit.img_size == views.global_size


@pytest.mark.parametrize(
    ("typed", "meant"), [("photo", "photos"), ("vitl16-short", "vitl16_short"), ("vitg", "vitg14")]
)
def test_unknown_recipe_gets_a_suggestion(typed: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=rf"unknown recipe '{typed}': did you mean '{meant}'\? the recipes are photos, "
    ):
        recipe(typed)


def test_hopeless_name_lists_the_recipes() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'xyz': the recipes are photos, "):
        recipe("xyz")
