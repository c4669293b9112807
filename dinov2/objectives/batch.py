"""The objective's input: checks of a batch's shapes, pairs of crops, and the index of masked patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_kernels._tables import table_cache


@dataclass(frozen=True)
class MaskedPatches:
    """Index and weight of the M masked patches of a batch.

    Attributes:
        index: [M] int64, position of each masked patch among the 2B * patches patches of the global crops.
        weight: [M], 1 / (2B * number of masked patches of the same crop).
    """

    index: Tensor
    weight: Tensor

    @classmethod
    def of(cls, masks: Tensor, device: torch.device, dtype: torch.dtype) -> MaskedPatches:
        """Find the masked patches of masks [2B, patches] on the masks' device, and copy the result to ``device``."""
        index = masks.flatten().nonzero()[:, 0]
        count = masks.sum(dim=1)[index // masks.shape[1]]
        weight = 1 / (len(masks) * count.to(dtype))
        return cls(send(index, device), send(weight, device))


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy of x on ``device``. The host does not wait for the copy, because a GPU reads it from pinned memory."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@table_cache(maxsize=8)
def crop_pairs(B: int, L: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two global crops that each crop is compared with, and the crop's weight in the mean over all pairs.

    A local crop is compared with both global crops of its image. A global crop is compared with the other one, twice
    and with half the weight, so that every crop has two targets.

    Args:
        B: number of images.
        L: number of local crops of each image.

    Returns:
        index: [2B + L B, 2] int64, for each crop two rows of the 2B global crops.
        weight: [2B + L B], weight of each crop.
    """
    image = torch.arange(B, device=device)
    both = torch.stack([image, image + B], dim=1)  # [B, 2]
    index = torch.cat([(image + B).repeat(2, 1).T, image.repeat(2, 1).T, both.repeat(L, 1)])
    pairs = 2 + max(2 * L, 1)
    weight = torch.full((len(index),), 1 / (pairs * B), device=device, dtype=dtype)
    weight[: 2 * B] /= 2
    return index, weight


def check_shapes(global_crops: Tensor, local_crops: Tensor, masks: Tensor) -> None:
    """Raise ValueError unless the shapes are those of two global and L local crops for each of the same images."""
    crops = len(global_crops)
    if crops == 0 or crops % 2:
        raise ValueError(f"global_crops: expected two crops of every image, got {crops} crops")
    if len(local_crops) % (crops // 2):
        raise ValueError(
            f"local_crops: expected a multiple of {crops // 2}, the images in global_crops, got {len(local_crops)}"
        )
    if masks.dtype != torch.bool or masks.dim() != 2 or len(masks) != crops:
        raise ValueError(
            f"masks: expected bool [{crops}, patches] to match global_crops, got {masks.dtype} {list(masks.shape)}"
        )
