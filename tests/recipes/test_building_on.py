"""Recipes that build on a network: the published numbers, and what they take over from a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dinov2.data import AugmentationConfig
from dinov2.models import DINOHead, VisionTransformer, ViTConfig, Weights
from dinov2.recipes import adaptation, distillation, recipe
from dinov2.train import DistillConfig, PretrainConfig
from dinov2.train.networks import checkpoint_of
from dinov2.train.run_directory import write_config
from dinov2.train.saving import CheckpointDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a ViT-L/14 run with two checkpoints, of which adaptation reads no more than the names."""
    config = replace(recipe("vitl14"), output=tmp_path / "first", seed=3)
    write_config(config)
    for step in (1250, 2500):
        CheckpointDirectory(config.output / "checkpoints", keep=1).path(step).mkdir(parents=True)
    return config.output


def test_adaptation_changes_what_the_paper_says_and_nothing_else(run: Path) -> None:
    before, config = recipe("vitl14"), adaptation(run, 518)
    assert config == replace(
        before,
        seed=3,
        output=run.with_name("first-518"),
        steps=10_000,
        initial_weights=checkpoint_of(run, 2500),
        vit=replace(before.vit, img_size=518),
        optim=replace(before.optim, base_lr=2e-5),
        data=replace(config.data, augmentation=AugmentationConfig(global_size=518, local_size=224)),
    )


def test_adaptation_of_what_cannot_be_adapted(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="img_size: expected a multiple of patch_size = 14, got 512"):
        adaptation(run, 512)
    with pytest.raises(FileNotFoundError, match="nowhere is not the directory of a run"):
        adaptation(tmp_path / "nowhere", 518)
    write_config(DistillConfig(output=tmp_path / "d", steps=1, batch_size=2, students={"a": ViTConfig()}))
    with pytest.raises(ValueError, match="is a distillation: adaptation continues a student and its teacher"):
        adaptation(tmp_path / "d", 518)


def write_teacher(path: Path, **heads: DINOHead) -> dict[str, Tensor]:
    """``teacher_checkpoint.pth`` of a ViT of width 64 with two registers."""
    vit = VisionTransformer(ViTConfig(embed_dim=64, num_heads=1, depth=1, num_register_tokens=2))
    tensors = {f"backbone.{name}": tensor for name, tensor in vit.state_dict().items()}
    for head, module in heads.items():
        tensors |= {f"{head}.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"teacher": tensors}, path)
    return tensors


def test_distillation_by_the_published_table(tmp_path: Path) -> None:
    write_teacher(tmp_path / "t.pth", dino_head=DINOHead(64, 9, 8, 7), ibot_head=DINOHead(64, 6, 8, 5))
    config = distillation(tmp_path / "t.pth", ["vit_small", "vit_base"])
    assert (config.steps, config.batch_size, config.accumulation_steps) == (625_000, 2048, 32)
    assert config.optim.base_lr * math.sqrt(config.batch_size / 1024) == pytest.approx(1e-3)
    assert config.optim.warmup_fraction * config.steps == 100_000
    assert (config.optim.weight_decay, config.optim.weight_decay_end) == (0.04, 0.2)
    assert (config.teacher.momentum, config.teacher.momentum_end) == (0.994, 1.0)
    shape = {"patch_size": 14, "num_register_tokens": 2, "drop_path_rate": 0.0, "ffn": "mlp"}
    assert config.students == {name: ViTConfig.of(name, **shape) for name in ("vit_small", "vit_base")}
    assert config.ibot_head is not None
    assert (config.dino_head.out_dim, config.ibot_head.out_dim, config.ibot_head.bottleneck_dim) == (9, 6, 5)
    views = config.data.augmentation
    assert (views.global_size, views.local_size, views.local_crops) == (224, 98, 8)
    shared = recipe("vitg14")
    assert (config.objective, config.teacher) == (shared.objective, shared.teacher)
    assert replace(config.optim, base_lr=0) == replace(shared.optim, base_lr=0)


def test_a_run_teaches_as_it_was_trained(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, centring and temperature are those of its heads."""
    before = recipe("vitl16_short")
    views = replace(before.data.augmentation, global_size=112, blur="paper")
    before = replace(
        before,
        output=run,
        data=replace(before.data, augmentation=views),
        teacher=replace(before.teacher, temperature=0.05),
    )
    write_config(before)
    weights = Weights(
        "a test", before.vit, {"cls_token": torch.zeros(1)}, {"dino_head": DINOHead(4, 9, 8, 7).state_dict()}
    )
    monkeypatch.setattr("dinov2.train.networks.read_teacher", lambda path: weights)
    config = distillation(run, ["vit_small"])
    assert config.data == replace(before.data, root=str(before.data.root))
    assert config.objective == before.objective
    assert config.teacher == replace(before.teacher, momentum=0.994)
    assert (config.students["vit_small"].img_size, config.students["vit_small"].patch_size) == (112, 16)


def test_the_digest_is_of_every_weight(tmp_path: Path) -> None:
    tensors = write_teacher(tmp_path / "t.pth", dino_head=DINOHead(64, 9, 8, 7))
    first = distillation(tmp_path / "t.pth", ["vit_small"])
    for name in ("backbone.mask_token", "dino_head.last_layer.weight_g"):
        changed = {**tensors, name: tensors[name] + 1}
        torch.save({"teacher": changed}, tmp_path / "changed.pth")
        assert (
            distillation(tmp_path / "changed.pth", ["vit_small"]).frozen_teacher_sha256 != first.frozen_teacher_sha256
        )
    torch.save(tensors, tmp_path / "other_form.pth")
    assert distillation(tmp_path / "other_form.pth", ["vit_small"]).frozen_teacher_sha256 == first.frozen_teacher_sha256


def test_channels_of_network_and_images_must_agree() -> None:
    with pytest.raises(ValueError, match=r"vit\.in_chans: expected 3, the channels of the images .*, got 4"):
        PretrainConfig(output=Path("x"), steps=1, batch_size=2, vit=ViTConfig(in_chans=4))
