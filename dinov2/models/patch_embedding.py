"""Patches of an image as tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts images into square patches and projects each linearly.

    Args:
        patch_size: height and width P of a patch in pixels.
        in_chans: channels of the images.
        embed_dim: width D of the tokens.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches along the height and the width of images [B, in_chans, H, W].

        Raises:
            ValueError: the images have another shape, or a height or width that is no multiple of the patch.
        """
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images: expected shape [B, {self.in_chans}, H, W], got {list(images.shape)}")
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            expected = f"height and width that are multiples of the patch size {self.patch_size}"
            raise ValueError(f"images: expected {expected}, got {height} x {width}")
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, in_chans, H, W]; returns [B, h * w, D], the patches row by row.

        The convolution does not overlap, so it is a matrix product of the patches, which runs faster than PyTorch's
        convolution with such a stride and writes the tokens in their order.
        """
        (h, w), size = self.grid(images), self.patch_size
        patches = images.unflatten(3, (w, size)).unflatten(2, (h, size))  # [B, in_chans, h, P, w, P]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, h * w, in_chans * P * P]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
