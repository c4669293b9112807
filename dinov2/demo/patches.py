"""The task of the demo: name the photograph that a patch comes from. With patches, probe and hand-made baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from dinov2.data import AugmentationConfig
from dinov2.data.loader import ImageDataset
from dinov2.evaluate.features import image_features
from dinov2.evaluate.handmade import descriptors
from dinov2.evaluate.knn import knn_accuracy
from dinov2.extras import require
from dinov2.models import VisionTransformer

Half = Literal["left", "right"]


@dataclass(frozen=True)
class Patches:
    """Patches of photographs with labels. As a map-style dataset, it gives the patches without labels, for training."""

    images: npt.NDArray[np.uint8]  # [N, size, size, 3]
    labels: npt.NDArray[np.int64]  # [N] number of the photograph that a patch comes from

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> npt.NDArray[np.uint8]:
        patch: npt.NDArray[np.uint8] = self.images[index]
        return patch


def cut_patches(photographs: ImageDataset, *, half: Half, size: int, per_photograph: int, seed: int) -> Patches:
    """Patches at random places of one half of each photograph; patches of the same half may overlap.

    The halves meet at the middle column and share no pixel, so neither do patches of different halves.

    Args:
        photographs: uint8 RGB ``[H, W, 3]`` each.
        half: the half to cut from.
        size: side of a patch in pixels.
        per_photograph: number of patches of each photograph.
        seed: seed of the places.

    Raises:
        ValueError: half of a photograph is smaller than a patch.
    """
    rng = np.random.default_rng(seed)
    cut: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for number in range(len(photographs)):
        region = half_of(photographs[number], half)
        height, width, _ = region.shape
        if min(height, width) < size:
            raise ValueError(
                f"size: expected at most {min(height, width)}, to fit into the {half} half of photograph {number} of"
                f" {height} x {width}, got {size}"
            )
        tops = rng.integers(0, height - size + 1, per_photograph)
        lefts = rng.integers(0, width - size + 1, per_photograph)
        cut += [region[top : top + size, left : left + size] for top, left in zip(tops, lefts, strict=True)]
        labels += [number] * per_photograph
    return Patches(np.stack(cut), np.array(labels, dtype=np.int64))


def half_of(photograph: npt.NDArray[np.uint8], half: Half) -> npt.NDArray[np.uint8]:
    """A view of the left or right half of a photograph; the right half has the middle column of an odd width."""
    middle = photograph.shape[1] // 2
    return photograph[:, :middle] if half == "left" else photograph[:, middle:]


class PatchProbe:
    """k-NN accuracy of naming the photograph that a patch comes from.

    Args:
        index: patches whose photographs are known.
        queries: patches whose photographs are predicted, from other parts of the same photographs.
        augmentation: the model's augmentation in training; gives mean and std.
        k: number of neighbours that vote.
    """

    def __init__(self, index: Patches, queries: Patches, augmentation: AugmentationConfig, k: int = 5) -> None:
        self.index = index
        self.queries = queries
        self.augmentation = augmentation
        self.k = k

    def __call__(self, model: VisionTransformer) -> dict[str, float]:
        """``{"knn_accuracy": ...}`` of :func:`~dinov2.evaluate.features.image_features`, between 0 and 1."""
        accuracy = knn_accuracy(
            image_features(model, self.index.images, self.augmentation),
            torch.from_numpy(self.index.labels),
            image_features(model, self.queries.images, self.augmentation),
            torch.from_numpy(self.queries.labels),
            k=self.k,
        )
        return {"knn_accuracy": accuracy}


def handmade_accuracies(index: Patches, queries: Patches, k: int = 5) -> dict[str, float]:
    """Accuracy, 0 ... 1, of naming the photograph of each query, by an equal vote of its k nearest neighbours.

    Raw pixels are compared by Euclidean distance. Histograms are compared by the sum of absolute differences, which
    suits them best.

    Raises:
        ImportError: scikit-image or scikit-learn is missing (extra ``demo``).
    """
    neighbors = require("sklearn.neighbors", extra="demo", purpose="handmade_accuracies")
    of_index, of_queries = descriptors(index.images), descriptors(queries.images)
    accuracies = {}
    for name in of_index:
        metric = "euclidean" if name == "raw pixels" else "manhattan"
        classifier = neighbors.KNeighborsClassifier(k, metric=metric).fit(of_index[name], index.labels)
        accuracies[name] = float(classifier.score(of_queries[name], queries.labels))
    return accuracies
