"""A batch: raw, as crops are cut, or finished, as the objective takes it. Workers finish batches, or a GPU does.

B images of C channels, L local crops of each. Crops are in crop-major order: the first crops of all images, then the
second ones, and so on.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from dinov2.data import multichannel
from dinov2.data.augmentation import AugmentationConfig, Crop
from dinov2_kernels import PhotometricPlan, photometric
from dinov2_kernels._library import triton_is_installed
from dinov2_kernels.photometric import ImagePlan


class Batch(TypedDict):
    """What :class:`dinov2.objectives.SelfDistillation` takes."""

    global_crops: Tensor  # [2 * B, C, H, W] float32, normalised
    local_crops: Tensor  # [L * B, C, h, w] float32, normalised
    masks: Tensor  # [2 * B, patches] bool: True where the student must predict


class RawCrops(NamedTuple):
    """N crops as they were cut, and what is still to be done to them."""

    pixels: Tensor  # [N, size, size, 3] uint8
    plan: Tensor  # [N, 12] float32, the table of a dinov2_kernels.PhotometricPlan


class RawBatch(TypedDict):
    """A batch before :func:`finish`: the images of C = 3 channels in a quarter of the bytes."""

    global_crops: RawCrops  # 2 * B
    local_crops: RawCrops  # L * B
    masks: Tensor  # [2 * B, patches] bool, as in a Batch


def finishes_crops(device: torch.device) -> bool:
    """Whether a device has a kernel for what follows the cut; elsewhere that is for the workers."""
    return device.type == "cuda" and triton_is_installed()


def finish(batch: Batch | RawBatch, augmentation: AugmentationConfig, device: torch.device) -> Batch:
    """Bring the crops of a batch to a device and, if they are raw, carry out their plans there.

    Copies from pinned memory do not wait, and neither does the operator. Masks stay on the host: the number of masked
    patches is a shape, and asking a GPU for it would wait for all work queued there.

    Args:
        batch: from :func:`~dinov2.data.batches`.
        augmentation: what the crops were cut by; gives the normalisation.
        device: where the networks are.

    Returns:
        Crops in float32 whatever the precision of training: what they are does not depend on it, and autocast rounds
        them where it wants them rounded.
    """

    def finished(crops: Tensor | RawCrops) -> Tensor:
        if isinstance(crops, Tensor):
            return crops.to(device, non_blocking=True)
        pixels, plan = (part.to(device, non_blocking=True) for part in crops)
        return photometric(pixels, PhotometricPlan(plan), mean=augmentation.mean, std=augmentation.std)

    return Batch(
        global_crops=finished(batch["global_crops"]),
        local_crops=finished(batch["local_crops"]),
        masks=batch["masks"],
    )


class RGBBuffer:
    """Room for some crops of each of ``images`` RGB images, which are left as they are."""

    def __init__(self, config: AugmentationConfig, crops: int, images: int, size: int) -> None:
        self._pixels = np.empty((crops, images, size, size, config.channels), np.uint8)
        self._plans = [[ImagePlan()] * images for _ in range(crops)]

    def put(self, number: int, image: int, crop: Crop) -> None:
        """Crop ``number`` of an image."""
        self._pixels[number, image], self._plans[number][image] = crop.pixels, crop.plan

    def crops(self) -> RawCrops:
        """All of them, once they are here."""
        table = PhotometricPlan.of(plan for of_all in self._plans for plan in of_all).table
        return RawCrops(torch.from_numpy(self._pixels).flatten(0, 1), table)


class MultichannelBuffer:
    """As :class:`RGBBuffer`, of images that may differ in their type, and are finished as they come."""

    def __init__(self, config: AugmentationConfig, crops: int, images: int, size: int) -> None:
        self._config = config
        self._pixels = np.empty((crops, images, config.channels, size, size), np.float32)

    def put(self, number: int, image: int, crop: Crop) -> None:
        """Crop ``number`` of an image."""
        config = self._config
        self._pixels[number, image] = multichannel.finish(*crop, config.blur_kernel, config.mean, config.std)

    def crops(self) -> Tensor:
        """All of them, once they are here."""
        return torch.from_numpy(self._pixels).flatten(0, 1)
