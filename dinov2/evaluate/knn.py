"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; DINOv2's evaluation protocol)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_CHUNK = 1024
TRAIN_CHUNK = 65536


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the test features that their nearest neighbours among the training features classify correctly.

    Features are L2-normalised. The k nearest neighbours by cosine vote for their class with weight
    ``exp(cosine / temperature)``; ``temperature=math.inf`` gives each one vote. If classes get equal votes, the lower
    one wins. The reference normalises the weights over the largest k that it evaluates, which changes no result.

    Args:
        train_features: floating point, ``[N, D]``.
        train_labels: integer classes, ``[N]``.
        test_features: floating point, ``[B, D]``.
        test_labels: integer classes, ``[B]``.
        k: number of neighbours that vote; the protocol reports 10, 20, 100 and 200.
        temperature: at a lower temperature, closer neighbours have more weight.

    Returns:
        Accuracy between 0 and 1.

    Raises:
        ValueError: shapes do not match, or k does not fit N.
    """
    _check(train_features, train_labels, "train")
    _check(test_features, test_labels, "test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"test_features: expected [B, {train_features.shape[1]}], the width of train_features, got"
            f" {list(test_features.shape)}"
        )
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k: expected 1 to {len(train_features)}, the number of training features, got {k}")
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    correct = 0
    for queries, labels in zip(test_features.split(QUERY_CHUNK), test_labels.split(QUERY_CHUNK), strict=True):
        cosine, index = nearest(queries, train_features, k)  # [b, k]
        weight = torch.exp((cosine - cosine[:, :1]) / temperature)
        votes = weight.new_zeros(len(queries), num_classes).scatter_add_(1, train_labels[index], weight)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test_labels)


def nearest(queries: Tensor, train_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines of each query, ``[b, k]`` in descending order, and their training rows, ``[b, k]``.

    It takes the training features in chunks, so memory holds at most ``b * TRAIN_CHUNK`` new cosines.
    """
    queries = F.normalize(queries.float(), dim=1)
    cosine = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(train_features), TRAIN_CHUNK):
        chunk = F.normalize(train_features[start : start + TRAIN_CHUNK].float(), dim=1)
        rows = torch.arange(start, start + len(chunk), device=queries.device)
        cosine = torch.cat([cosine, queries @ chunk.T], dim=1)  # [b, k + chunk]
        index = torch.cat([index, rows.expand(len(queries), -1)], dim=1)
        cosine, best = cosine.topk(min(k, cosine.shape[1]), dim=1)
        index = index.gather(1, best)
    return cosine, index


def _check(features: Tensor, labels: Tensor, name: str) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(
            f"{name}_features: expected floating point [N, D], got {features.dtype} {list(features.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.dtype.is_floating_point:
        raise ValueError(
            f"{name}_labels: expected integers [{len(features)}], one per feature,"
            f" got {labels.dtype} {list(labels.shape)}"
        )
    if len(features) == 0:
        raise ValueError(f"{name}_features: expected at least one feature, got none")
