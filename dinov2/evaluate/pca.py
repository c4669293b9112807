"""Principal components of patch features as colours, after the first figure of DINOv2 (arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pca_colours(maps: Sequence[Tensor], *, first: int = 0, outliers: float = 0.02) -> list[Tensor]:
    """Colours of features: three principal components, shared by all maps, as red, green and blue.

    Args:
        maps: features ``[h, w, D]`` each, of one width D.
        first: number of leading components to leave out; the first often tells only figure from ground.
        outliers: share of the values at either end of a component that is clipped to no and full brightness.

    Returns:
        float32 ``[h, w, 3]`` each, from 0 to 1.

    Raises:
        ValueError: there are fewer than ``first + 3`` components.
    """
    features = torch.cat([features.flatten(0, 1) for features in maps])  # [N, D]
    if features.shape[1] < first + 3:
        raise ValueError(f"features must have at least {first + 3} numbers, but have {features.shape[1]}")
    components = principal_components(features, first + 3)[:, first:]  # [D, 3]
    scores = (features - features.mean(dim=0)) @ components  # [N, 3]
    ordered = scores.sort(dim=0).values
    cut = int(outliers * (len(ordered) - 1))
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    parts = colours.split([features.shape[0] * features.shape[1] for features in maps])
    return [part.unflatten(0, features.shape[:2]) for part, features in zip(parts, maps, strict=True)]


def principal_components(features: Tensor, number: int) -> Tensor:
    """Directions of largest variance of ``[N, D]`` features, orthonormal columns ``[D, number]``, largest first.

    Of the two signs of a direction, the one that makes its largest entry positive.
    """
    centred = features.double() - features.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = vectors.flip(1)[:, :number]
    largest = components.abs().argmax(dim=0, keepdim=True)
    signed: Tensor = components * components.gather(0, largest).sign()
    return signed.to(features.dtype)
