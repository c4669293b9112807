"""A probe for pretraining: k-NN accuracy on a folder of labelled images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinov2.data import AugmentationConfig, ImageFolder, normalize
from dinov2.evaluate.knn import knn_accuracy
from dinov2.models import VisionTransformer


class FolderProbe:
    """k-NN accuracy of class tokens on ``folder/train/CLASS/...``, asked by ``folder/test/CLASS/...``.

    Images are resized to ``size * 8 / 7`` (shorter side, bicubic), cropped to the central ``size`` pixels and
    normalised, as the evaluation protocol does with 256 and 224; ``size`` is that of the global crops.

    Args:
        folder: holds ``train`` and ``test``, each with one folder of images per class.
        augmentation: what the model is trained with; gives the size and the normalisation.
        k: neighbours that vote.

    Raises:
        ValueError: a part is missing or empty, or ``test`` has a class that ``train`` lacks.
    """

    def __init__(self, folder: Path, augmentation: AugmentationConfig, k: int = 20) -> None:
        self.parts = {part: ImageFolder(folder / part) for part in ("train", "test")}
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
            batch = torch.stack([self._view(images[row]) for row in rows])  # [b, 3, size, size]
            chunks.append(model(batch.to(device)).float().cpu())
        return torch.cat(chunks)  # [N, D]

    def _view(self, image: npt.NDArray[np.uint8]) -> Tensor:
        views = self.augmentation
        return torch.from_numpy(normalize(central_crop(image, views.global_size), views.mean, views.std))


def central_crop(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """The centre of an image whose shorter side is first resized to ``size * 8 / 7``, uint8 ``[size, size, 3]``."""
    height, width = image.shape[:2]
    scale = size * 8 / 7 / min(height, width)
    resized = Image.fromarray(image).resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
