"""Position embeddings of files for models of another image size: as the model resamples them that they are from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.models import VisionTransformer, ViTConfig, load_pretrained, read_weights, save_pretrained

TinyViT = Callable[..., VisionTransformer]
WIDE = {"embed_dim": 128}  # two heads of width 64: what shapes alone can tell
FACEBOOKS = {0: (0.1, False), 4: (0.0, True)}
"""Number of registers -> offset and antialiasing in facebook's hub/backbones.py."""


def facebooks_positions(table: Tensor, grid: tuple[int, int], offset: float, antialias: bool) -> Tensor:
    """The formula of facebook's ``interpolate_pos_encoding``: from [1, 1 + M * M, D] to [1, 1 + h * w, D]."""
    side = int((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    target: dict[str, Any] = {"size": grid}
    if offset:
        target = {"scale_factor": tuple(float(patches_along + offset) / side for patches_along in grid)}
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    return torch.cat([table[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def features(model: VisionTransformer, size: tuple[int, int]) -> Tensor:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().forward_features(x)["x_norm_patchtokens"]


@pytest.mark.parametrize("registers", FACEBOOKS)
@pytest.mark.parametrize("theirs", [70, 140, 56])
@pytest.mark.parametrize("flags", [(0.1, False), (0.0, True)], ids=str)
def test_facebooks_weights_in_any_model(
    tiny_vit: TinyViT, tmp_path: Path, registers: int, theirs: int, flags: tuple[float, bool]
) -> None:
    """Whatever the given model's own way was, it now is the file's: at its image size and at any other."""
    offset, antialias = FACEBOOKS[registers]
    facebooks = tiny_vit(
        img_size=theirs,
        num_register_tokens=registers,
        interpolate_offset=offset,
        interpolate_antialias=antialias,
        **WIDE,
    )
    torch.save(facebooks.state_dict(), tmp_path / "weights.pth")
    own = {"interpolate_offset": flags[0], "interpolate_antialias": flags[1]}
    model = tiny_vit(img_size=56, num_register_tokens=registers, **own, **WIDE)
    load_pretrained(tmp_path / "weights.pth", model)
    expected = facebooks_positions(facebooks.pos_embed, (4, 4), offset, antialias)
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=0)
    torch.testing.assert_close(features(model, (56, 56)), features(facebooks, (56, 56)))
    assert (model.config.interpolate_offset, model.config.interpolate_antialias) == (offset, antialias)
    assert model.config == replace(facebooks.config, img_size=56)
    for grid in ((2, 2), (3, 5), (8, 6)):
        size = (14 * grid[0], 14 * grid[1])
        with torch.no_grad():  # a model whose own table already is the one of this size
            direct = facebooks_positions(model.pos_embed, grid, offset, antialias)
            x = torch.randn(1, 3, *size)
            tokens = model._tokens(x, None)
            patches = model.patch_embed(x)
        torch.testing.assert_close(tokens[:, 1 + registers :], patches + direct[:, 1:])
        if theirs == 56:  # the whole table is there, so every size is right
            torch.testing.assert_close(features(model, size), features(facebooks, size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_half_precision_are_rounded_once(tiny_vit: TinyViT, tmp_path: Path, dtype: torch.dtype) -> None:
    facebooks = tiny_vit(img_size=70, **WIDE).to(dtype)
    torch.save(facebooks.state_dict(), tmp_path / "weights.pth")
    expected = facebooks_positions(facebooks.pos_embed, (4, 4), 0.1, False)
    model = load_pretrained(tmp_path / "weights.pth", tiny_vit(img_size=56, **WIDE))
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=0)
    in_half = load_pretrained(tmp_path / "weights.pth", tiny_vit(img_size=56, **WIDE).to(dtype))
    torch.testing.assert_close(in_half.pos_embed, expected.to(dtype), rtol=0, atol=0)
    tensors = read_weights(tmp_path / "weights.pth").backbone_for(model.config)
    torch.testing.assert_close(tensors["pos_embed"], expected, rtol=0, atol=0)


def test_our_own_files_tell_their_way(tiny_vit: TinyViT, tmp_path: Path) -> None:
    for flags in ({"interpolate_offset": 0.1, "interpolate_antialias": False}, {}):
        large = tiny_vit(img_size=98, **flags)
        save_pretrained(large, tmp_path)
        for other in ({}, {"interpolate_offset": 0.1, "interpolate_antialias": False}):
            small = load_pretrained(tmp_path, tiny_vit(img_size=56, **other))
            torch.testing.assert_close(features(small, (56, 56)), features(large, (56, 56)))
            assert small.config == replace(large.config, img_size=56)


def test_the_model_keeps_the_rest_of_its_configuration(tiny_vit: TinyViT, tmp_path: Path) -> None:
    save_pretrained(tiny_vit(drop_path_rate=0.1), tmp_path)
    model = load_pretrained(tmp_path, tiny_vit(drop_path_rate=0.3, drop_path_uniform=False, interpolate_offset=0.1))
    assert (model.config.drop_path_rate, model.config.drop_path_uniform) == (0.3, False)
    assert model.config.interpolate_offset == 0.0


def test_a_model_that_does_not_fit_stays_as_it_was(tiny_vit: TinyViT, tmp_path: Path) -> None:
    save_pretrained(tiny_vit(depth=3, interpolate_offset=0.1), tmp_path)
    model = tiny_vit()
    before, config = {name: x.clone() for name, x in model.state_dict().items()}, model.config
    with pytest.raises(ValueError, match="do not fit the model"):
        load_pretrained(tmp_path, model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.config is config


def test_a_compiled_model_resamples_as_its_new_weights(tiny_vit: TinyViT, tmp_path: Path) -> None:
    facebooks = tiny_vit(interpolate_offset=0.1, interpolate_antialias=False, **WIDE)
    torch.save(facebooks.state_dict(), tmp_path / "weights.pth")
    model, x = tiny_vit(**WIDE), torch.randn(1, 3, 42, 70)
    compiled = torch.compile(model.eval(), backend="eager")
    with torch.no_grad():
        compiled(x)
        load_pretrained(tmp_path / "weights.pth", model)
        torch.testing.assert_close(compiled(x), facebooks(x))


@pytest.mark.parametrize("tokens", [1, 2 * 3, 2 * 3 + 1, 4 + 17])
def test_tables_of_other_grids(tiny_vit: TinyViT, tmp_path: Path, tokens: int) -> None:
    tensors = dict(tiny_vit(**WIDE).state_dict())
    tensors["pos_embed"] = torch.zeros(1, tokens, 128)
    safetensors.torch.save_file(tensors, tmp_path / "weights.safetensors")
    message = rf"pos_embed: expected shape \[1, 1 \+ M \* M, D\] for a square grid .*, got \[1, {tokens}, 128\]"
    for model in (None, tiny_vit(**WIDE)):
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "weights.safetensors", model)


def test_patches_that_are_not_square(tmp_path: Path) -> None:
    tensors = dict(VisionTransformer(ViTConfig(img_size=28, embed_dim=64, depth=1, num_heads=1)).state_dict())
    tensors["patch_embed.proj.weight"] = torch.zeros(64, 3, 14, 7)
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"patch_embed\.proj\.weight: expected shape .* square patches, got \[64, 3, 14"
    ):
        load_pretrained(tmp_path / "weights.pth")
