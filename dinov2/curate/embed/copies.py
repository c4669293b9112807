"""Features that tell copies of one image from different images, without weights that somebody trained.

SIFT (Lowe 2004) of an image and of its mirror image, so that flips do not matter; by Hellinger's distance (RootSIFT,
Arandjelovic and Zisserman 2012), decorrelated; gathered as a vector of locally aggregated descriptors (VLAD, Jegou et
al. 2010) of unit residuals, of which the square root is taken; whitened, so that what all images of a pool share does
not count (Jegou and Chum 2012). All that is fitted is fitted to a sample of the pool: :func:`fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.embed.models import Features
from dinov2.data.decoding import Pixels
from dinov2_kernels._extras import require

Floats = npt.NDArray[np.float32]

SIDE = 256  # pixels of the longer side
KEYPOINTS = 400
CONTRAST = 0.005  # an eighth of SIFT's own threshold: quiet images have keypoints too
LOCAL_WIDTH = 64  # numbers kept of a keypoint's 128
CENTROIDS = 32
WIDTH = 256
SAMPLED_KEYPOINTS = 60_000
ROUNDS = 15  # of k-means
FLOOR = 1e-3  # added to variances, as a share of the largest: directions of noise are not blown up


class Fitted(NamedTuple):
    """What is fitted to a pool; arrays of float32.

    Attributes:
        local_mean: [128] of the keypoints' descriptors.
        local_basis: [128, LOCAL_WIDTH] decorrelates them.
        centroids: [CENTROIDS, LOCAL_WIDTH].
        mean: [CENTROIDS LOCAL_WIDTH] of the images' vectors.
        basis: [CENTROIDS LOCAL_WIDTH, d] whitens them, d at most WIDTH.
    """

    local_mean: Floats
    local_basis: Floats
    centroids: Floats
    mean: Floats
    basis: Floats


def fit(images: Sequence[Pixels], seed: int = 0) -> Fitted:
    """Fit to images uint8 [H, W, 3] of a pool.

    Raises:
        ValueError: they have no keypoints.
    """
    rng = np.random.default_rng(seed)
    described = [keypoints(image) for image in images]
    local = np.concatenate([both for pair in described for both in pair]) if described else np.zeros((0, 128))
    if len(local) < CENTROIDS:
        raise ValueError(f"features of copies are fitted to {CENTROIDS} keypoints or more, but the sample has {len(local)}")
    local = local[np.sort(rng.choice(len(local), min(SAMPLED_KEYPOINTS, len(local)), replace=False))]  # [S, 128]
    local_mean = local.mean(axis=0)
    variances, directions = _principal(local - local_mean, LOCAL_WIDTH)
    local_basis = directions / (variances + FLOOR * variances[0]) ** 0.25  # half-way to white
    centroids = _k_means((local - local_mean) @ local_basis, rng)
    partial = Fitted(local_mean, local_basis, centroids, np.zeros(0, np.float32), np.zeros((0, 0), np.float32))
    vectors = np.stack([_aggregated(pair, partial) for pair in described])  # [n, CENTROIDS * LOCAL_WIDTH]
    mean = vectors.mean(axis=0)
    variances, directions = _principal(vectors - mean, WIDTH)
    basis = directions / np.sqrt(variances + FLOOR * variances[0])
    return Fitted(*(array.astype(np.float32) for array in (local_mean, local_basis, centroids, mean, basis)))


def describe(images: Sequence[Pixels], fitted: Fitted) -> Features:
    """Features [n, d] of images uint8 [H, W, 3]; NaN of those without keypoints, such as flat colours."""
    rows = []
    for image in images:
        pair = keypoints(image)
        vector = (_aggregated(pair, fitted) - fitted.mean) @ fitted.basis
        rows.append(vector if len(pair[0]) else np.full_like(vector, np.nan))
    return np.stack(rows)


def keypoints(image: Pixels) -> tuple[Floats, Floats]:
    """RootSIFT descriptors [k, 128] of an image and [l, 128] of its mirror image, of unit length."""
    cv2 = require("cv2", extra="curate", purpose="features of copies")
    scale = SIDE / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    sift = cv2.SIFT_create(nfeatures=KEYPOINTS, contrastThreshold=CONTRAST, edgeThreshold=20)
    return _root(sift.detectAndCompute(grey, None)[1]), _root(sift.detectAndCompute(np.ascontiguousarray(grey[:, ::-1]), None)[1])


def _root(descriptors: Floats | None) -> Floats:
    if descriptors is None:
        return np.zeros((0, 128), np.float32)
    roots: Floats = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-6))
    return roots


def _aggregated(pair: tuple[Floats, Floats], fitted: Fitted) -> Floats:
    """The vector of an image, of unit length: for each centroid the sum of the unit residuals of its keypoints."""
    local = (np.concatenate(pair) - fitted.local_mean) @ fitted.local_basis  # [k + l, LOCAL_WIDTH]
    nearest = _nearest(local, fitted.centroids)
    residuals = local - fitted.centroids[nearest]
    residuals /= np.maximum(np.linalg.norm(residuals, axis=1, keepdims=True), 1e-6)
    sums = np.zeros_like(fitted.centroids)
    np.add.at(sums, nearest, residuals)
    vector = (np.sign(sums) * np.sqrt(np.abs(sums))).ravel()
    unit: Floats = vector / max(float(np.linalg.norm(vector)), 1e-6)
    return unit


def _nearest(points: Floats, centroids: Floats) -> npt.NDArray[np.int64]:
    return ((centroids**2).sum(axis=1) - 2 * points @ centroids.T).argmin(axis=1)


def _k_means(points: Floats, rng: np.random.Generator) -> Floats:
    centroids = points[rng.choice(len(points), CENTROIDS, replace=False)]  # [CENTROIDS, LOCAL_WIDTH]
    for _ in range(ROUNDS):
        nearest = _nearest(points, centroids)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, points)
        counts = np.bincount(nearest, minlength=CENTROIDS)[:, None]
        centroids = np.where(counts > 0, sums / np.maximum(counts, 1), centroids)
    return centroids


def _principal(centred: Floats, width: int) -> tuple[Floats, Floats]:
    """Variances [w] and directions [D, w] of the largest principal components, w at most ``width``."""
    width = min(width, *centred.shape)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    return np.maximum(variances[::-1][:width], 1e-12), directions[:, ::-1][:, :width]
