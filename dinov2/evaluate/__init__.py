"""Evaluation of frozen features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2.lazily import names_from

if TYPE_CHECKING:
    from dinov2.evaluate.embedding import Embedding, embed
    from dinov2.evaluate.features import dense_features, image_features, neighbourhood_features, pca_colours
    from dinov2.evaluate.knn import knn_accuracy
    from dinov2.evaluate.probe import FolderProbe
else:
    __getattr__ = names_from(
        __name__,
        {
            "embedding": ("Embedding", "embed"),
            "features": ("dense_features", "image_features", "neighbourhood_features", "pca_colours"),
            "knn": ("knn_accuracy",),
            "probe": ("FolderProbe",),
        },
    )

__all__ = [
    "Embedding",
    "FolderProbe",
    "dense_features",
    "embed",
    "image_features",
    "knn_accuracy",
    "neighbourhood_features",
    "pca_colours",
]
