"""The definition of block masking, in Python. ``csrc/host.cpp`` makes the same draws, with bitwise equal results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ATTEMPTS_PER_BLOCK = 10
_UINT64 = (1 << 64) - 1


class SplitMix64:
    """A 64-bit generator (Steele, Lea and Flood, 2014); native code can draw the same numbers."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _UINT64
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _UINT64
        return z ^ (z >> 31)

    def uniform(self, low: float, high: float) -> float:
        """A double between ``low`` and ``high``; ``high`` may be smaller than ``low``."""
        return low + (high - low) * ((self.next() >> 11) * 2.0**-53)

    def below(self, bound: int) -> int:
        """An integer in ``[0, bound)``, ``bound < 2**31``."""
        return ((self.next() >> 32) * bound) >> 32


def sample_block_masks(
    height: int,
    width: int,
    counts: Sequence[int] | npt.NDArray[np.int64],
    *,
    seed: int,
    min_patches: int,
    max_patches: int,
    min_log_aspect: float,
    max_log_aspect: float,
) -> npt.NDArray[np.bool_]:
    """Block masks, bool ``[len(counts), height, width]``; see :func:`dinov2.data.sample_block_masks`."""
    random = SplitMix64(seed)

    def add_block(mask: npt.NDArray[np.bool_], cap: int) -> int:
        """Mask one block that adds 1 to ``cap`` patches; return their number, or 0 if every attempt failed."""
        for _ in range(ATTEMPTS_PER_BLOCK):
            area = random.uniform(min_patches, cap)
            aspect = math.exp(random.uniform(min_log_aspect, max_log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = random.below(height - h + 1), random.below(width - w + 1)
            block = mask[top : top + h, left : left + w]
            added = h * w - int(np.count_nonzero(block))
            if 0 < added <= cap:
                block[:] = True
                return added
        return 0

    masks = np.zeros((len(counts), height, width), dtype=np.bool_)
    for mask, count in zip(masks, counts, strict=True):
        masked = 0
        while masked < count:
            added = add_block(mask, min(int(count) - masked, max_patches))
            if added == 0:
                break
            masked += added
    return masks
