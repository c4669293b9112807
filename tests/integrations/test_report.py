"""What accelerate(model) swaps and what it leaves, and what report(model) says about it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from dinov2.models import VisionTransformer, ViTConfig
from dinov2_kernels.integrations import accelerate, report
from tests.integrations.facebook import Attention, MemEffAttention
from tests.integrations.models import MODELS, images, of_timm, operators_used, output, randomised


def test_report_is_a_table() -> None:
    model = of_timm("vit_so400m_patch14_siglip_224")
    assert {row.status for row in report(model).rows} == {"ready", "left"}
    accelerate(model)
    assert str(report(model)).splitlines() == [
        "VisionTransformer: 4 modules run on dinov2_kernels",
        "module               count  status",
        "Block                2      accelerated  stochastic_depth",
        "Attention            2      accelerated  varlen_attention",
        "AttentionPoolLatent  1      left         cross-attention: queries and keys are of different tokens",
    ]
    assert report(model).rows[0].names == ("blocks.0", "blocks.1")


def test_an_attention_that_wraps_another_is_not_listed() -> None:
    rows = report(accelerate(MODELS["earlier transformers Dinov2Model"]())).rows
    assert {row.kind: row.status for row in rows} == dict.fromkeys(
        ["Dinov2Layer", "Dinov2SelfAttention", "Dinov2SwiGLUFFN"], "accelerated"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch16_rope_224", "rotary position embeddings"),
        ("beit_base_patch16_224", "relative position bias"),
        ("vit_large_patch14_xp_224", "attention and feed-forward layer share their projections"),
        ("resnet18", "not a module that accelerate knows"),
    ],
)
def test_what_is_left_says_why(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match=f"nothing was swapped\n(.*\n)*.*left *{reason}"):
        accelerate(model)
    assert [type(m) for m in model.modules()] == before


def test_modules_with_another_forward_are_left() -> None:
    model = of_timm("vit_small_patch14_dinov2")
    first, second = model.blocks
    first.forward = lambda x: x

    class Other(type(second)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return x

    second.__class__ = Other
    details = {row.names: row.detail for row in report(accelerate(model)).rows}
    assert details["blocks.0",] == "its forward was replaced on the instance"
    assert details["blocks.0.attn", "blocks.1.attn"] == "varlen_attention"
    assert isinstance(second, Other)
    assert type(second) is Other


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


@pytest.mark.parametrize(
    ("part", "other", "reason"),
    [
        ("ls1", Squared(), "ls1 is a Squared, which is no LayerScale"),
        ("drop_path2", Squared(), "drop_path2 is a Squared, which is no DropPath"),
        ("drop_path1", timm.layers.DropPath(0.5, scale_by_keep=False), "its DropPath does not rescale what it keeps"),
    ],
)
def test_blocks_of_other_parts_are_left(part: str, other: nn.Module, reason: str) -> None:
    """Before they are accelerated for that reason, and after it they run their own forward."""
    model = randomised(of_timm("vit_small_patch14_dinov2"))
    early, late = model.blocks
    setattr(early, part, other)
    assert [row.detail for row in report(accelerate(model)).rows if row.names == ("blocks.0",)] == [reason]
    setattr(late, part, other)
    with operators_used() as used:
        output(model.train(), images())
    assert used == {"attention_forward"}


def test_attention_of_the_same_name_is_left() -> None:
    """That of the first DINO has the same name and parts, and returns its weights, too."""
    model = nn.Sequential(Attention(48, 4), MemEffAttention(48, 4))
    assert [row.status for row in report(accelerate(model)).rows] == ["left", "accelerated"]


def test_our_own_model_runs_on_the_kernels_already() -> None:
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=32, depth=2, num_heads=2, ffn="swiglu"))
    assert {(row.kind, row.status) for row in report(accelerate(model)).rows} == {
        ("Block", "native"),
        ("Attention", "native"),
        ("SwiGLUFFN", "native"),
    }
