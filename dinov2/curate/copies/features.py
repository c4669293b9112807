"""Features that find candidates for copies: where points of an image differ from typical ones, and what a small network
sees.

The first part is VLAD (Jegou et al., CVPR 2010): each point goes to the nearest of 64 words, and the differences of the
points to their word are summed. It finds crops and turned images, which the network misses. The network finds images
with few points. A mirror image has nearly the same features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load_file

from dinov2.curate.copies.network import WEIGHTS, describe
from dinov2.curate.copies.points import Floats, Sketch, mirror_descriptors, sketch
from dinov2.data.decoding import Pixels

WIDTH = 384
"""Dimensions of the first part: a random projection keeps the cosines of its 8,192 to within 0.05."""
SEED = 5
ENOUGH_POINTS = 40
"""Below this number the first part counts less, because few points are the same by chance."""


def describe_copies(images: list[Pixels], sketches: Sequence[Sketch | None] | None = None) -> Floats:
    """Features [b, 512] of unit length.

    Args:
        images: uint8 RGB images [H, W, 3].
        sketches: their sketches, if they have been made; those that are None are made here.

    Raises:
        ImportError: OpenCV is missing (extra ``curate``).
    """
    made = [None] * len(images) if sketches is None else sketches
    pairs = zip(images, made, strict=True)
    by_points = np.stack([describe_points(sketch(image) if own is None else own) for image, own in pairs])
    return unit(np.concatenate([by_points, describe(images)], axis=1))


def describe_points(of: Sketch) -> Floats:
    """Features [384] of the points of an image, of unit length if it has enough of them; zeros for no points."""
    if not len(of.descriptors):
        return np.zeros(WIDTH, np.float32)
    words = _words()
    total: Floats = _differences(of.descriptors, words) + _differences(mirror_descriptors(of.descriptors), words)
    row: Floats = unit(total.reshape(1, -1) @ _projection(words.size))[0]
    return row * np.float32(min(len(of.descriptors) / ENOUGH_POINTS, 1.0) ** 0.5)


def unit(rows: Floats) -> Floats:
    """Rows [n, D] scaled to unit length; zeros stay zeros."""
    scaled: Floats = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return scaled


def _differences(descriptors: Floats, words: Floats) -> Floats:
    """Sums of the differences of descriptors [n, 128] to their nearest word, each scaled to unit length, [64, 128]."""
    nearest = (descriptors @ words.T - (words**2).sum(axis=1) / 2).argmax(axis=1)
    sums = np.zeros_like(words)
    np.add.at(sums, nearest, descriptors - words[nearest])
    return unit(sums)


@functools.cache
def _words() -> Floats:
    """Typical descriptors float32 [64, 128], of which ``examples/copy_network.py`` says where they come from."""
    words: Floats = load_file(WEIGHTS)["words"].astype(np.float32)
    return words


@functools.cache
def _projection(size: int) -> Floats:
    """Random signs float32 [size, 384]."""
    # RandomState gives the same numbers in every version of NumPy.
    bits = np.random.RandomState(SEED).randint(0, 2, (size, WIDTH), dtype=np.int8)
    signs: Floats = bits.astype(np.float32) * 2 - 1
    return signs
