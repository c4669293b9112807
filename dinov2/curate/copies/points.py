"""Points of an image (SIFT) by which the same picture is found again: cropped, mirrored, turned, recoloured or pasted
into another picture.

Points and descriptors are those of Lowe (IJCV 2004), as OpenCV finds them. Square roots of descriptors are compared, as
in RootSIFT (Arandjelovic and Zisserman, CVPR 2012).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import Pixels
from dinov2.extras import require

SIDE = 256
"""Pixels of the longer side at which points are found."""
LARGEST_ENLARGEMENT = 3.0
"""Small images are enlarged by up to this factor: their points are few, and their cells small, at their own size."""
POINTS = 400
"""Largest number of points of an image: those of most contrast."""
CONTRAST = 0.015
"""Contrast that a point must have. OpenCV's own 0.04 leaves smooth photographs without points."""
FINE, COARSE = 1.5, 8.0
"""Sigma of the blurs between which detail is compared, in pixels: noise is finer, light and shade are coarser."""
QUALITY = 90
"""Quality of the JPEG of the grey levels that are kept for comparisons."""
BINS = 8  # directions of gradients in each of the 4 x 4 cells of a descriptor
WIDTH = 16 * BINS

Floats = npt.NDArray[np.float32]


class Sketch(NamedTuple):
    """What is compared of an image.

    Attributes:
        detail: what the grey levels show between a fine and a coarse scale, at a reduced size, float32 [H, W].
        places: x and y of the points in pixels of ``detail``, float32 [n, 2].
        descriptors: square roots of the points' descriptors, of unit length, float32 [n, 128].
    """

    detail: Floats
    places: Floats
    descriptors: Floats


def sketch(image: Pixels) -> Sketch:
    """Find the points of a uint8 RGB image [H, W, 3].

    Raises:
        ImportError: OpenCV is missing (extra ``curate``).
    """
    return unpacked(packed(image))


def packed(image: Pixels) -> bytes:
    """The points of a uint8 RGB image [H, W, 3] and its grey levels, in some 70 kB: a JPEG, and the numbers as OpenCV
    gives them."""
    cv2 = require("cv2", extra="curate", purpose="comparing images")
    height, width = image.shape[:2]
    scale = min(SIDE / max(height, width), LARGEST_ENLARGEMENT)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    grey = cv2.cvtColor(np.ascontiguousarray(small), cv2.COLOR_RGB2GRAY)
    found, descriptors = cv2.SIFT_create(POINTS, contrastThreshold=CONTRAST).detectAndCompute(grey, None)
    places = np.array([point.pt for point in found], "<f4").reshape(-1, 2)
    raw = np.zeros((0, WIDTH), np.uint8) if descriptors is None else descriptors.astype(np.uint8)
    picture: bytes = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return len(places).to_bytes(4, "little") + places.tobytes() + raw.tobytes() + picture


def unpacked(content: bytes) -> Sketch:
    """The sketch of an image from what :func:`packed` returned."""
    cv2 = require("cv2", extra="curate", purpose="comparing images")
    count = int.from_bytes(content[:4], "little")
    places = np.frombuffer(content, "<f4", 2 * count, 4).reshape(count, 2)
    raw = np.frombuffer(content, np.uint8, WIDTH * count, 4 + 8 * count).reshape(count, WIDTH).astype(np.float32)
    picture = np.frombuffer(content, np.uint8, offset=4 + (8 + WIDTH) * count)
    levels = cv2.imdecode(picture, cv2.IMREAD_GRAYSCALE).astype(np.float32)
    detail = cv2.GaussianBlur(levels, (0, 0), FINE) - cv2.GaussianBlur(levels, (0, 0), COARSE)
    return Sketch(detail, places, np.sqrt(raw / np.maximum(raw.sum(axis=1, keepdims=True), 1)))


def mirrored(of: Sketch) -> Sketch:
    """The sketch of the mirror image."""
    places = np.stack([of.detail.shape[1] - 1 - of.places[:, 0], of.places[:, 1]], axis=1)
    return Sketch(np.ascontiguousarray(of.detail[:, ::-1]), places, mirror_descriptors(of.descriptors))


def mirror_descriptors(descriptors: Floats) -> Floats:
    """The descriptors [n, 128] of the same points in the mirror image.

    A descriptor is a grid of 4 x 4 histograms of directions that is aligned with the point's own direction. To mirror
    it is to swap the rows of the grid and the signs of the directions.
    """
    return descriptors[:, _MIRROR]


def _mirror() -> npt.NDArray[np.int64]:
    row, column, direction = np.meshgrid(np.arange(4), np.arange(4), np.arange(BINS), indexing="ij")
    order: npt.NDArray[np.int64] = (((3 - row) * 4 + column) * BINS + -direction % BINS).ravel()
    return order


_MIRROR = _mirror()
