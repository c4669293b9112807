"""Learned position embeddings for images of any size."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_position_embedding(
    pos_embed: Tensor, grid: tuple[int, int], *, offset: float = 0.0, antialias: bool = True
) -> Tensor:
    """Resample the position embeddings of a square grid of M x M patches to another grid, bicubically.

    DINOv2's published models use two modes. Those without registers pass ``(patches + 0.1) / M`` as scale factor
    (``offset=0.1, antialias=False``): the offset was meant to guard the output size against rounding, but it moves the
    sampling points as well, so the weights expect it. Those with registers resample to the size itself
    (``offset=0, antialias=True``). A grid of M x M is returned as it is, in either mode.

    Args:
        pos_embed: [1, 1 + M * M, D] embedding of the class token, then of the patches row by row.
        grid: patches of the image along its height and its width (h, w).
        offset: added to the number of patches in the scale factor; 0 for the size itself.
        antialias: smooth before going to fewer patches.

    Returns:
        [1, 1 + h * w, D] in the dtype of ``pos_embed``; the arithmetic is float32, or float64 for float64.
    """
    size = isqrt(pos_embed.shape[1] - 1)  # M
    if grid == (size, size):
        return pos_embed
    patches = pos_embed[:, 1:].to(torch.promote_types(pos_embed.dtype, torch.float32))
    patches = patches.unflatten(1, (size, size)).permute(0, 3, 1, 2)  # [1, D, M, M]
    if offset:
        scale = ((grid[0] + offset) / size, (grid[1] + offset) / size)
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=antialias)
    patches = patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, h * w, D]
    return torch.cat([pos_embed[:, :1], patches], dim=1)
