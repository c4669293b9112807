"""Features of small images, features of every place in a large image, and their display as colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.data import AugmentationConfig, normalize
from dinov2.models import VisionTransformer


@torch.no_grad()
def image_features(
    model: VisionTransformer, images: npt.NDArray[np.uint8], augmentation: AugmentationConfig, batch_size: int = 250
) -> Tensor:
    """Features of whole images: the mean of the L2-normalised class tokens of an image and of its mirror image.

    Args:
        model: a model in eval mode, on any device.
        images: uint8 RGB ``[N, H, W, 3]``; sides are multiples of the model's patch size.
        augmentation: the model's augmentation in training; gives mean and std.
        batch_size: images per forward pass.

    Returns:
        float32 ``[N, D]`` on the CPU.
    """
    device = next(model.parameters()).device
    chunks = []
    for start in range(0, len(images), batch_size):
        views = [normalize(image, augmentation.mean, augmentation.std) for image in images[start : start + batch_size]]
        batch = torch.from_numpy(np.stack(views)).to(device)  # [b, 3, H, W]
        class_tokens = torch.stack([model(batch), model(batch.flip(3))])  # [2, b, D]
        chunks.append(F.normalize(class_tokens.float(), dim=2).mean(dim=0).cpu())
    return torch.cat(chunks)


@torch.no_grad()
def dense_features(
    model: VisionTransformer, image: npt.NDArray[np.uint8], augmentation: AugmentationConfig, *, stride: int
) -> Tensor:
    """Patch features of an image that is larger than the model's training images.

    A window of the model's image size moves over the image by ``stride`` pixels. The feature of a patch is the mean of
    its tokens in all windows that cover it.

    Args:
        model: a model in eval mode, on any device.
        image: uint8 RGB ``[H, W, 3]``; each side is the model's image size plus a multiple of stride.
        augmentation: the model's augmentation in training; gives mean and std.
        stride: step of the window in pixels, a multiple of the patch size, at most the model's image size.

    Returns:
        float32 ``[H / patch_size, W / patch_size, D]`` on the CPU.

    Raises:
        ValueError: stride or the size of the image is not as described.
    """
    window, patch, grid = model.config.img_size, model.config.patch_size, model.config.grid_size
    height, width, _ = image.shape
    if stride % patch or not 0 < stride <= window:
        raise ValueError(f"stride: expected a multiple of {patch}, the patch size, up to {window}, got {stride}")
    if min(height, width) < window or (height - window) % stride or (width - window) % stride:
        raise ValueError(
            f"image: expected sides of {window} plus a multiple of stride {stride}, got {height} x {width}"
        )
    tokens = torch.cat(
        [
            model.forward_features(row)["x_norm_patchtokens"].float().cpu()
            for row in _rows_of_windows(model, image, augmentation, stride)
        ]
    )  # [rows * columns, grid * grid, D]
    add_up = torch.nn.Fold((height // patch, width // patch), kernel_size=grid, stride=stride // patch)
    blocks = tokens.permute(2, 1, 0)  # [D, grid * grid, rows * columns]
    mean: Tensor = add_up(blocks) / add_up(torch.ones_like(blocks[:1]))  # [D, 1, H / patch, W / patch]
    return mean[:, 0].permute(1, 2, 0)


@torch.no_grad()
def neighbourhood_features(
    model: VisionTransformer, image: npt.NDArray[np.uint8], augmentation: AugmentationConfig, *, stride: int
) -> Tensor:
    """Class tokens of a window around every place of an image. The image is mirrored at its borders.

    Args:
        model: a model in eval mode, on any device; the window has the model's image size.
        image: uint8 RGB ``[H, W, 3]``, at least as large as the window.
        augmentation: the model's augmentation in training; gives mean and std.
        stride: distance between the places in pixels.

    Returns:
        float32 ``[H // stride + 1, W // stride + 1, D]`` on the CPU.
    """
    window = model.config.img_size
    before, after = window // 2, window - window // 2
    padded = np.pad(image, ((before, after), (before, after), (0, 0)), mode="reflect")
    return torch.stack([model(row).float().cpu() for row in _rows_of_windows(model, padded, augmentation, stride)])


def _rows_of_windows(
    model: VisionTransformer, image: npt.NDArray[np.uint8], augmentation: AugmentationConfig, stride: int
) -> Iterator[Tensor]:
    """Rows of windows of the model's image size, ``stride`` apart: ``[columns, 3, window, window]`` on its device."""
    window, device = model.config.img_size, next(model.parameters()).device
    pixels = torch.from_numpy(normalize(image, augmentation.mean, augmentation.std))  # [3, H, W]
    windows = pixels.unfold(1, window, stride).unfold(2, window, stride)  # [3, rows, columns, window, window]
    for row in windows.unbind(dim=1):
        yield row.transpose(0, 1).to(device)


def pca_colours(maps: Sequence[Tensor], *, first: int = 0, outliers: float = 0.02) -> list[Tensor]:
    """Colours of features: three principal components of all maps together, as red, green and blue.

    Args:
        maps: features ``[h, w, D]`` each, with the same D.
        first: number of leading components to leave out; the first often only separates figure from ground.
        outliers: share of the lowest and of the highest values of a component that are clipped, to 0 and to 1.

    Returns:
        float32 ``[h, w, 3]`` each, from 0 to 1.

    Raises:
        ValueError: there are fewer than ``first + 3`` components.
    """
    features = torch.cat([features.flatten(0, 1) for features in maps])  # [N, D]
    if features.shape[1] < first + 3:
        raise ValueError(f"maps: expected features of at least {first + 3} numbers, got {features.shape[1]}")
    components = principal_components(features, first + 3)[:, first:]  # [D, 3]
    scores = (features - features.mean(dim=0)) @ components  # [N, 3]
    ordered = scores.sort(dim=0).values
    cut = int(outliers * (len(ordered) - 1))
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = colours.split([features.shape[0] * features.shape[1] for features in maps])
    return [part.unflatten(0, features.shape[:2]) for part, features in zip(parts, maps, strict=True)]


def principal_components(features: Tensor, number: int) -> Tensor:
    """Directions of largest variance of features ``[N, D]``: orthonormal columns ``[D, number]``, largest first.

    The sign of each direction makes its largest entry positive.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = vectors.flip(1)[:, :number]
    largest = components.abs().argmax(dim=0, keepdim=True)
    signed: Tensor = components * components.gather(0, largest).sign()
    return signed.to(features.dtype)
