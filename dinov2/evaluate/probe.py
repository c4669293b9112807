"""A probe for pretraining: k-NN accuracy on a folder of labelled images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dinov2.data import AugmentationConfig, ImageFolder, normalize
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels
from dinov2.evaluate.knn import knn_accuracy
from dinov2.models import VisionTransformer

MAX_ASPECT = 32
"""An image that is longer than this times its width is cut to its middle first: all of it could fill the memory."""


class FolderProbe:
    """k-NN accuracy of class tokens: queries in ``folder/test/CLASS/...``, neighbours in ``folder/train/CLASS/...``.

    Images are resized to ``size * 8 / 7`` (shorter side, bicubic), cropped to the central ``size`` pixels and
    normalised, as the evaluation protocol does with 256 and 224. ``size`` is the size of the global crops.

    Args:
        folder: contains ``train`` and ``test``, each with one folder of images per class.
        augmentation: the model's augmentation in training; gives size, mean, std and number of channels.
        k: number of neighbours that vote.

    Raises:
        ValueError: a part is missing or empty, or ``test`` has a class that ``train`` lacks.
    """

    def __init__(self, folder: Path, augmentation: AugmentationConfig, k: int = 20) -> None:
        self.parts = {part: ImageFolder(folder / part, augmentation.channels) for part in ("train", "test")}
        self.augmentation = augmentation
        self.k = min(k, len(self.parts["train"]))
        classes = {part: [Path(path).parts[0] for path in images.paths] for part, images in self.parts.items()}
        if unknown := set(classes["test"]) - set(classes["train"]):
            raise ValueError(
                f"{folder / 'test'} has classes that {folder / 'train'} lacks: {', '.join(sorted(unknown))}"
            )
        number = {name: index for index, name in enumerate(sorted(set(classes["train"])))}
        self.labels = {part: torch.tensor([number[name] for name in names]) for part, names in classes.items()}

    def __call__(self, model: VisionTransformer) -> dict[str, float]:
        """``{"knn_accuracy": ...}`` of ``model``, between 0 and 1."""
        features = {part: self._features(model, images) for part, images in self.parts.items()}
        accuracy = knn_accuracy(
            features["train"], self.labels["train"], features["test"], self.labels["test"], k=self.k
        )
        return {"knn_accuracy": accuracy}

    @torch.no_grad()
    def _features(self, model: VisionTransformer, images: ImageFolder, batch_size: int = 64) -> Tensor:
        device = next(model.parameters()).device
        chunks = []
        for start in range(0, len(images), batch_size):
            rows = range(start, min(start + batch_size, len(images)))
            batch = torch.stack([central_view(images[row], self.augmentation) for row in rows])  # [b, C, size, size]
            chunks.append(model(batch.to(device)).float().cpu())
        return torch.cat(chunks)  # [N, D]


def central_view(image: Pixels, augmentation: AugmentationConfig) -> Tensor:
    """The view of an image for evaluation: its normalised centre, float32 ``[C, size, size]``.

    ``size`` is the size of the global crops.
    """
    return torch.from_numpy(
        normalize(central_crop(image, augmentation.global_size), augmentation.mean, augmentation.std)
    )


def central_crop(image: Pixels, size: int) -> Pixels:
    """Resize the shorter side of an image to ``size * 8 / 7`` and cut the centre: ``[size, size, C]`` in its dtype.

    Args:
        image: uint8, uint16 or float32 ``[H, W, C]``.
        size: side of the result.
    """
    longest = MAX_ASPECT * min(image.shape[:2])
    starts = [max(0, side - longest) // 2 for side in image.shape[:2]]
    image = image[starts[0] : starts[0] + longest, starts[1] : starts[1] + longest]
    scale = size * 8 / 7 / min(image.shape[:2])
    height, width = (max(size, round(side * scale)) for side in image.shape[:2])
    top, left = (height - size) // 2, (width - size) // 2
    return resized(image, height, width)[top : top + size, left : left + size]
