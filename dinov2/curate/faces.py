"""Finds faces and blurs them, so that nobody can be recognised but the image still shows people.

Blurring follows the faces-obfuscated ImageNet (Yang et al., arXiv:2103.06191). A box grows on every side by a tenth of
its longer side. A tenth of that side is also the sigma of the blur and of the mask that blends the blur into the image.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.curate.plugins import load_function
from dinov2.data.decoding import Pixels, decode_image, read_header
from dinov2.extras import require

DETECTION_SIDE = 320  # pixels of the longer side that the bundled detector looks at
SMALLEST_FACE = 24  # side of the smallest face, in pixels of the reduced image
SHARE = 0.1  # part of a box's longer side by which it grows and is blurred
REACH = 8  # standard deviations around a box that affect its blur and the blur of its mask
FINEST_SIGMA = 24.0  # pixels; from twice this sigma on, a smaller image is blurred (within one grey level)


class Box(NamedTuple):
    """A face, in pixels of the upright image."""

    x: int
    y: int
    width: int
    height: int


Detector = Callable[[list[Pixels]], list[list[Box]]]


def open_detector(name: str) -> Detector | None:
    """The detector that a configuration names; None for ``none``.

    Raises:
        ValueError: the detector cannot be imported.
        ImportError: scikit-image is missing (extra ``curate``).
    """
    if name in ("none", ""):
        return None
    if name == "bundled":
        require("skimage.feature", extra="curate", purpose="finding faces")
        return bundled_detector
    function = load_function(name)
    return lambda images: [[Box(*map(int, box)) for box in boxes] for boxes in function(images)]


def bundled_detector(images: list[Pixels]) -> list[list[Box]]:
    """Find upright frontal faces by a cascade of local binary patterns that comes with scikit-image. It is fast and
    needs no download of weights, but misses many faces: side views, small faces and covered faces."""
    return [_detect(image) for image in images]


@functools.cache
def _cascade() -> Any:
    feature = require("skimage.feature", extra="curate", purpose="finding faces")
    data = require("skimage.data", extra="curate", purpose="finding faces")
    return feature.Cascade(data.lbp_frontal_face_cascade_filename())


def _detect(image: Pixels) -> list[Box]:
    cv2 = require("cv2", extra="curate", purpose="finding faces")
    scale = min(DETECTION_SIDE / max(image.shape[:2]), 1.0)
    width, height = (max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
    if min(width, height) <= SMALLEST_FACE:
        return []
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    found = _cascade().detect_multi_scale(
        small, 1.2, 1, min_size=(SMALLEST_FACE, SMALLEST_FACE), max_size=(min(width, height),) * 2
    )
    boxes = [Box(*(round(face[side] / scale) for side in ("c", "r", "width", "height"))) for face in found]
    return sorted(boxes)


def blur_faces(image: Pixels, boxes: Sequence[Box]) -> Pixels:
    """Return a copy of a uint8 image [H, W, 3] with blurred faces."""
    result = image.copy()
    for box in boxes:
        side = SHARE * max(box.width, box.height)
        sigma = max(side, 0.5)
        rows, columns = (
            slice(max(round(start - side), 0), max(round(start + length + side), 0))
            for start, length in ((box.y, box.height), (box.x, box.width))
        )
        margin = math.ceil(REACH * sigma)  # no pixel beyond it changes
        top, left = max(rows.start - margin, 0), max(columns.start - margin, 0)
        part = result[top : rows.stop + margin, left : columns.stop + margin].astype(np.float32)
        if not part.size:
            continue
        mask = np.zeros((*part.shape[:2], 1), np.float32)
        mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = 1
        mask = _blur(mask, sigma)
        part += mask * (_blur(part, sigma) - part)
        result[top : rows.stop + margin, left : columns.stop + margin] = np.clip(np.rint(part), 0, 255)
    return result


def _blur(image: npt.NDArray[np.float32], sigma: float) -> npt.NDArray[np.float32]:
    """Gaussian blur of float32 [H, W, C]. A wide blur works on a smaller image, so time does not grow with sigma."""
    cv2 = require("cv2", extra="curate", purpose="blurring faces")
    height, width, channels = image.shape
    step = max(int(sigma / FINEST_SIGMA), 1)
    size = (math.ceil(width / step), math.ceil(height / step))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if step > 1 else image
    # Sides of the smaller image are whole numbers, so its pixels may be a little narrower or lower than ``step``.
    small = cv2.GaussianBlur(small, (0, 0), sigma * size[0] / width, sigmaY=sigma * size[1] / height)
    whole = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR) if step > 1 else small
    blurred: npt.NDArray[np.float32] = whole.reshape(height, width, channels)
    return blurred


def blurred_file(content: bytes, boxes: Sequence[Box]) -> bytes:
    """Blur the faces of an image file. The result is upright 8-bit RGB, as training reads it: a JPEG of quality 95 if
    the file was a JPEG, else a PNG.

    Raises:
        UnreadableImageError: the file cannot be decoded.
    """
    kind = "JPEG" if read_header(content, "file").extension == ".jpg" else "PNG"
    pixels = decode_image(content, "file")
    file = io.BytesIO()
    Image.fromarray(blur_faces(pixels, boxes)).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()
