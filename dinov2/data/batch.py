"""A batch: raw, with crops as they were cut, or finished, for the objective. Workers or a GPU finish batches.

A batch has B images of C channels and L local crops of each image. Crops are in crop-major order: the first crops of
all images, then the second crops, and so on.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from dinov2.data import multichannel
from dinov2.data.augmentation import Crop
from dinov2.data.config import AugmentationConfig
from dinov2_kernels import PhotometricPlan, photometric
from dinov2_kernels._library import triton_is_installed
from dinov2_kernels.photometric import ImagePlan


class Batch(TypedDict):
    """A finished batch, the input of :class:`dinov2.objectives.SelfDistillation`."""

    global_crops: Tensor  # [2 * B, C, H, W] float32, normalised
    local_crops: Tensor  # [L * B, C, h, w] float32, normalised
    masks: Tensor  # [2 * B, patches] bool: True where the student must predict


class RawCrops(NamedTuple):
    """N crops as they were cut, and their plans."""

    pixels: Tensor  # [N, size, size, 3] uint8
    plan: Tensor  # [N, 12] float32, the table of a dinov2_kernels.PhotometricPlan


class RawBatch(TypedDict):
    """A batch of RGB images before :func:`finish`; it takes a quarter of the bytes."""

    global_crops: RawCrops  # 2 * B
    local_crops: RawCrops  # L * B
    masks: Tensor  # [2 * B, patches] bool, as in a Batch


def finishes_crops(device: torch.device) -> bool:
    """Whether a device has a kernel that finishes crops; for other devices the workers finish them."""
    return device.type == "cuda" and triton_is_installed()


def finish(batch: Batch | RawBatch, augmentation: AugmentationConfig, device: torch.device) -> Batch:
    """Copy the crops of a batch to a device and, if they are raw, carry out their plans there.

    Neither the copies from pinned memory nor the operator wait for the device. Masks stay on the host: the number of
    masked patches is a shape, and reading it from a GPU would wait for all work in its queue.

    Args:
        batch: a batch from :func:`~dinov2.data.batches`.
        augmentation: the configuration that cut the crops; gives mean and std.
        device: device of the networks.

    Returns:
        The finished batch. Its crops are float32 in every precision of training; autocast rounds them where needed.
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
    """Memory for ``crops`` raw crops of each of ``images`` RGB images."""

    def __init__(self, config: AugmentationConfig, crops: int, images: int, size: int) -> None:
        self._pixels = np.empty((crops, images, size, size, config.channels), np.uint8)
        self._plans = [[ImagePlan()] * images for _ in range(crops)]

    def put(self, number: int, image: int, crop: Crop) -> None:
        """Store crop ``number`` of an image."""
        self._pixels[number, image], self._plans[number][image] = crop.pixels, crop.plan

    def crops(self) -> RawCrops:
        """All crops, after the last call of :meth:`put`."""
        table = PhotometricPlan.of(plan for of_all in self._plans for plan in of_all).table
        return RawCrops(torch.from_numpy(self._pixels).flatten(0, 1), table)


class MultichannelBuffer:
    """Like :class:`RGBBuffer`, for images of any number of channels and mixed dtypes; it finishes each crop at once."""

    def __init__(self, config: AugmentationConfig, crops: int, images: int, size: int) -> None:
        self._config = config
        self._pixels = np.empty((crops, images, config.channels, size, size), np.float32)

    def put(self, number: int, image: int, crop: Crop) -> None:
        """Store crop ``number`` of an image."""
        config = self._config
        self._pixels[number, image] = multichannel.finish(*crop, config.blur_kernel, config.mean, config.std)

    def crops(self) -> Tensor:
        """All crops, after the last call of :meth:`put`."""
        return torch.from_numpy(self._pixels).flatten(0, 1)
