"""What the objective takes: checks of a batch's shapes, and where its masked patches are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskedPatches:
    """Where the M masked patches of a batch are.

    Attributes:
        index: [M] int64, position among the 2B * patches patches of the global crops.
        count: [M] int64, number of masked patches in the same crop.
    """

    index: Tensor
    count: Tensor

    @classmethod
    def of(cls, masks: Tensor, device: torch.device) -> MaskedPatches:
        """Find them in masks [2B, patches], on the masks' own device, and bring them to ``device``."""
        index = masks.flatten().nonzero()[:, 0]
        count = masks.sum(dim=1)[index // masks.shape[1]]
        return cls(index.to(device, non_blocking=True), count.to(device, non_blocking=True))


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
