"""What tests plug in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import Pixels

batches: list[int] = []
"""Sizes of those that :func:`redness` was asked about."""


def redness(images: list[Pixels]) -> npt.NDArray[np.float32]:
    """A scorer."""
    batches.append(len(images))
    return np.array([image[..., 0].mean() / 255 for image in images], np.float32)


def corner(images: list[Pixels]) -> list[list[tuple[int, int, int, int]]]:
    """A detector that sees a face in the corner of wide images."""
    return [[(0, 0, 20, 30)] if image.shape[1] > image.shape[0] else [] for image in images]
