"""PCA hash: 64 bits of an image that stay when it is compressed, scaled or slightly recoloured.

The paper names a PCA hash without defining it. This one is the signs of the first 64 principal components of the grey
image of 32 x 32 pixels and unit contrast, fitted to a sample of the pool. Images without
contrast have no hash that means anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import Pixels
from dinov2_kernels._extras import require

SIDE = 32
BITS = 64
MIN_CONTRAST = 2.0  # standard deviation of grey levels below which there is no hash

Floats = npt.NDArray[np.float32]


def thumbnail(image: Pixels) -> Floats | None:
    """Grey, 32 x 32, of mean 0 and length 1, float32 [1024]; None without contrast. The image is uint8 [H, W, 3]."""
    cv2 = require("cv2", extra="curate", purpose="PCA hashes")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).ravel()
    if small.std() < MIN_CONTRAST:
        return None
    small -= small.mean()
    unit: Floats = small / np.linalg.norm(small)
    return unit


def fit_directions(thumbnails: Sequence[Floats]) -> Floats:
    """Mean and principal directions of thumbnails [1024] each: float32 [1 + 64, 1024], the mean first."""
    x = np.stack(thumbnails) if thumbnails else np.zeros((1, SIDE * SIDE), np.float32)
    mean = x.mean(axis=0)
    _, directions = np.linalg.eigh((x - mean).T @ (x - mean))
    directions = directions[:, ::-1][:, :BITS].T
    # An eigenvector has no sign of its own: its largest number is made positive, so that all machines agree.
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return np.concatenate([mean[None], directions * np.sign(largest)]).astype(np.float32)


def pca_hash(unit: Floats, fitted: Floats) -> int:
    """64 bits of a thumbnail, as an unsigned integer."""
    return int(np.packbits((fitted[1:] @ (unit - fitted[0])) > 0, bitorder="little").view(np.uint64)[0])


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """Pairs [M, 2] of hashes [N] that differ in at most ``distance`` bits, enough of them to connect all such pairs.

    Of ``distance + 1`` bands of bits one at least is the same in both of a pair, so only hashes that share a band are
    compared. Equal hashes are linked in a row; of different ones each is compared with all that share a band.
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    same = inverse[order][1:] == inverse[order][:-1]
    pairs = [np.stack([order[:-1][same], order[1:][same]], axis=1)]
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = (values >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        by_band = np.argsort(band, kind="stable")
        for step in range(1, len(values)):
            a, b = by_band[:-step], by_band[step:]
            together = band[a] == band[b]
            if not together.any():
                break
            a, b = a[together], b[together]
            near = _bits(values[a] ^ values[b]) <= distance
            pairs.append(np.stack([first[a[near]], first[b[near]]], axis=1))
    return np.concatenate(pairs).astype(np.int64)


def _bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """How many bits are set."""
    bits = np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1)  # [N, 64]
    counts: npt.NDArray[np.int64] = bits.sum(axis=1, dtype=np.int64)
    return counts
