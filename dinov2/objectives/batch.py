"""What the objective takes: checks of a batch's shapes, and where its masked patches are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_kernels._tables import table_cache


@dataclass(frozen=True)
class MaskedPatches:
    """Where the M masked patches of a batch are.

    Attributes:
        index: [M] int64, position among the 2B * patches patches of the global crops.
        weight: [M], 1 / (2B * masked patches of the same crop).
    """

    index: Tensor
    weight: Tensor

    @classmethod
    def of(cls, masks: Tensor, device: torch.device, dtype: torch.dtype) -> MaskedPatches:
        """Find them in masks [2B, patches], on the masks' own device, and bring them to ``device``."""
        index = masks.flatten().nonzero()[:, 0]
        count = masks.sum(dim=1)[index // masks.shape[1]]
        weight = 1 / (len(masks) * count.to(dtype))
        return cls(send(index, device), send(weight, device))


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy of x on ``device``, without waiting for it: a GPU fetches it from pinned memory when its turn comes."""
    if x.device.type == "cpu" and device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@table_cache(maxsize=8)
def crop_pairs(B: int, L: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which global crops each crop is compared with, and its weight in the mean over all pairs.

    Global crops face the other one of their image, twice with half the weight, local crops both: so all face two.

    Args:
        B: images.
        L: local crops of each.

    Returns:
        index: [2B + L B, 2] int64, rows of the 2B global crops.
        weight: [2B + L B].
    """
    image = torch.arange(B, device=device)
    both = torch.stack([image, image + B], dim=1)  # [B, 2]
    index = torch.cat([(image + B).repeat(2, 1).T, image.repeat(2, 1).T, both.repeat(L, 1)])
    pairs = 2 + max(2 * L, 1)
    weight = torch.full((len(index),), 1 / (pairs * B), device=device, dtype=dtype)
    weight[: 2 * B] /= 2
    return index, weight


def check_shapes(global_crops: Tensor, local_crops: Tensor, masks: Tensor) -> None:
    """Raise ValueError unless the tensors belong to two global crops and L local ones of the same images."""
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
