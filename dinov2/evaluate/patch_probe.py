"""A probe for pretraining on photographs: from which photograph is this patch?"""

from __future__ import annotations

import torch

from dinov2.data import AugmentationConfig
from dinov2.data.patches import Patches
from dinov2.evaluate.features import image_features
from dinov2.evaluate.knn import knn_accuracy
from dinov2.models import VisionTransformer


class PatchProbe:
    """k-NN accuracy of naming the photograph that a patch comes from.

    Args:
        index: patches whose photograph is known.
        queries: patches whose photograph is asked for, from other parts of the same photographs.
        augmentation: what the model is trained with; gives the normalisation.
        k: neighbours that vote.
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
