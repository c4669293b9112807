"""Square patches cut out of photographs, from one half of each: what the photographs recipe learns and is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov2.data.loader import ImageDataset

Half = Literal["left", "right"]


@dataclass(frozen=True)
class Patches:
    """Patches of photographs; a map-style dataset of the patches alone, as unlabelled training images."""

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
        half: the side to cut from.
        size: side of a patch in pixels.
        per_photograph: patches of each photograph.
        seed: decides the places.

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
                f"size must fit into half of every photograph, but is {size}, and the {half} half of"
                f" photograph {number} is {height} x {width}"
            )
        tops = rng.integers(0, height - size + 1, per_photograph)
        lefts = rng.integers(0, width - size + 1, per_photograph)
        cut += [region[top : top + size, left : left + size] for top, left in zip(tops, lefts, strict=True)]
        labels += [number] * per_photograph
    return Patches(np.stack(cut), np.array(labels, dtype=np.int64))


def half_of(photograph: npt.NDArray[np.uint8], half: Half) -> npt.NDArray[np.uint8]:
    """The left or right half of a photograph, a view; the right one has the middle column of an odd width."""
    middle = photograph.shape[1] // 2
    return photograph[:, :middle] if half == "left" else photograph[:, middle:]
