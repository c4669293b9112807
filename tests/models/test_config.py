"""Configurations of vision transformers."""

from __future__ import annotations

from typing import Any

import pytest

from dinov2.models import ViTConfig, vit_small


def test_known_architecture() -> None:
    config = ViTConfig.of("vit_giant2", patch_size=16, drop_path_rate=0.4)
    assert (config.embed_dim, config.depth, config.num_heads, config.ffn) == (1536, 40, 24, "swiglu")
    assert (config.patch_size, config.drop_path_rate, config.grid_size) == (16, 0.4, 14)


def test_fields_of_an_architecture_can_be_changed() -> None:
    assert ViTConfig.of("vit_small", depth=3).depth == 3


def test_unknown_fields_of_an_architecture() -> None:
    with pytest.raises(TypeError, match=r"^colour: expected a field of ViTConfig, got an unknown one$"):
        ViTConfig.of("vit_small", colour="red")
    message = (
        r"^block_chunks: expected a field of ViTConfig, got .*another package named dinov2: see docs/two_packages\.md"
    )
    with pytest.raises(TypeError, match=message):
        vit_small(img_size=518, block_chunks=0)


def test_unknown_architecture_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"architecture: expected one of .*, got 'vit_larg'; 'vit_large'\?"):
        ViTConfig.of("vit_larg")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"img_size": 225}, "img_size: expected a multiple of patch_size = 14, got 225"),
        ({"num_heads": 5}, "num_heads: expected a divisor of embed_dim = 384, got 5"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"ffn": "swiglufused"}, "ffn: expected one of mlp, swiglu, got 'swiglufused'"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**fields)
