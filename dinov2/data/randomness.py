"""Random generators derived from a seed and a position, so that any part of a run can be drawn again by itself."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for: streams of one seed are independent of each other."""

    ORDER = 0
    AUGMENTATION = 1
    MASKS = 2
    SUBSTITUTES = 3


def derived_generator(seed: int, stream: Stream, *position: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments, e.g. on the seed, the stream and the step."""
    return np.random.default_rng((seed, stream, *position))
