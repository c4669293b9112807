"""PCA hash: 64 bits of an image that stay the same when it is compressed, scaled or slightly recoloured.

The paper names a PCA hash without defining it. This hash takes the signs of the first 64 principal components of the
grey image at 32 x 32 pixels and unit contrast. They are fitted to a sample of the pool. Images without contrast have no
hash.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import Pixels
from dinov2.extras import require

SIDE = 32
BITS = 64
PRIOR_IMAGES = 20.0  # the prior has the weight of this many images of the pool
PRIOR_LENGTH = 8.0  # pixels of the thumbnail over which the correlation falls by a factor of e
MIN_CONTRAST = 2.0  # standard deviation of grey levels below which there is no hash

Floats = npt.NDArray[np.float32]


def thumbnail(image: Pixels) -> npt.NDArray[np.uint8]:
    """The grey levels uint8 [1024] of an image uint8 [H, W, 3] at 32 x 32 pixels, row by row."""
    cv2 = require("cv2", extra="curate", purpose="PCA hashes")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small: npt.NDArray[np.uint8] = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).ravel()
    return small


def standardized(thumbnails: npt.NDArray[np.uint8]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Thumbnails uint8 [N, 1024] scaled to mean 0 and length 1, float32, and which [N] have contrast; others are 0."""
    centred = thumbnails.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    lengths = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    contrast = lengths[:, 0] >= MIN_CONTRAST * SIDE  # sqrt(1024) times the standard deviation
    return np.where(contrast[:, None], centred / np.maximum(lengths, 1e-6), 0), contrast


def fit_directions(units: Floats) -> Floats:
    """Mean and principal directions of standardized thumbnails [N, 1024]: float32 [1 + 64, 1024], the mean first.

    A prior is added to the sample's covariance: near pixels of any photograph are similar. Without it, the directions
    of a small sample would be noise, and so would be the bits.
    """
    import torch

    x = torch.from_numpy(units if len(units) else np.zeros((1, SIDE * SIDE), np.float32)).double()
    mean = x.mean(dim=0)
    place = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()  # [1024, 2]
    likeness = torch.exp(-torch.cdist(place, place) / PRIOR_LENGTH)
    covariance = (x - mean).T @ (x - mean) + PRIOR_IMAGES * likeness / len(likeness)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :BITS].T
    # The sign of an eigenvector is arbitrary. Its largest number is made positive, so that all machines agree.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    fitted: Floats = torch.cat([mean[None], directions * largest.sign()]).float().numpy()
    return fitted


def pca_hashes(units: Floats, fitted: Floats) -> npt.NDArray[np.uint64]:
    """64 bits of each standardized thumbnail [N, 1024], as unsigned integers [N]."""
    import torch

    centred = torch.from_numpy(units).double() - torch.from_numpy(fitted[0]).double()
    bits = (centred @ torch.from_numpy(fitted[1:]).double().T > 0).numpy()  # [N, 64]
    hashes: npt.NDArray[np.uint64] = np.packbits(bits, axis=1, bitorder="little").view(np.uint64)[:, 0]
    return hashes


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """Pairs [M, 2] of hashes [N] that differ in at most ``distance`` bits. The pairs connect all such hashes.

    The bits are cut into ``distance + 1`` bands. Both hashes of a pair share at least one band, so only hashes that
    share a band are compared. Equal hashes are linked in a chain. Each distinct hash is compared with all that share a
    band.
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
    """The number of bits that are set in each value."""
    bits = np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1)  # [N, 64]
    counts: npt.NDArray[np.int64] = bits.sum(axis=1, dtype=np.int64)
    return counts
