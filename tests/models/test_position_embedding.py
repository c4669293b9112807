"""Interpolation of position embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2.models.vision_transformer import interpolate_position_embedding

MODES = [(0.0, True), (0.1, False)]


@pytest.mark.parametrize(("offset", "antialias"), MODES)
def test_the_own_grid_is_returned_as_it_is(offset: float, antialias: bool) -> None:
    pos_embed = torch.randn(1, 17, 8)
    assert interpolate_position_embedding(pos_embed, (4, 4), offset=offset, antialias=antialias) is pos_embed


@pytest.mark.parametrize(("offset", "antialias"), MODES)
def test_as_many_patches_in_another_shape_are_interpolated(offset: float, antialias: bool) -> None:
    pos_embed = torch.randn(1, 17, 8)
    result = interpolate_position_embedding(pos_embed, (2, 8), offset=offset, antialias=antialias)
    assert result.shape == pos_embed.shape
    assert not torch.allclose(result, pos_embed)
    torch.testing.assert_close(result[:, 0], pos_embed[:, 0])


@pytest.mark.parametrize("grid", [(h, w) for h in (1, 2, 7, 37) for w in (1, 3, 16, 40)], ids=str)
@pytest.mark.parametrize("size", [4, 7, 37])
def test_the_offset_keeps_the_number_of_patches(size: int, grid: tuple[int, int]) -> None:
    pos_embed = torch.randn(1, 1 + size * size, 2)
    result = interpolate_position_embedding(pos_embed, grid, offset=0.1, antialias=False)
    assert result.shape == (1, 1 + grid[0] * grid[1], 2)


def test_rows_follow_the_height() -> None:
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)  # every patch knows its row
    pos_embed = F.pad(rows, (0, 0, 1, 0))
    result = interpolate_position_embedding(pos_embed, (8, 2), antialias=False)[0, 1:, 0].view(8, 2)
    torch.testing.assert_close(result[:, 0], result[:, 1])
    assert result[:, 0].diff().ge(0).all()
    assert result[-1, 0] > 2.9


def test_the_offset_moves_the_sampling_points() -> None:
    pos_embed = torch.randn(1, 17, 8)
    plain = interpolate_position_embedding(pos_embed, (6, 6), antialias=False)
    moved = interpolate_position_embedding(pos_embed, (6, 6), offset=0.1, antialias=False)
    assert (plain - moved).abs().max() > 1e-2


def test_half_precision_is_interpolated_in_float32() -> None:
    pos_embed = torch.randn(1, 17, 8).bfloat16()
    result = interpolate_position_embedding(pos_embed, (6, 5))
    expected = interpolate_position_embedding(pos_embed.float(), (6, 5)).bfloat16()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
