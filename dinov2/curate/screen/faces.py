"""Faces: found, and blurred so that nobody can be recognised while the image stays an image of people.

The rule of blurring is that of the faces-obfuscated ImageNet (Yang et al., arXiv:2103.06191): a box grows by a tenth of
its longer side on every side, and is blended with a blur of a tenth of that side through a mask blurred likewise.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from dinov2.curate.plugins import load_function
from dinov2.data.decoding import Pixels
from dinov2_kernels._extras import require

DETECTION_SIDE = 320  # pixels of the longer side that the bundled detector looks at
SMALLEST_FACE = 24  # pixels of these
SHARE = 0.1  # of the longer side of a box, by which it grows and is blurred


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
        ValueError: it cannot be imported.
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
    """Upright frontal faces, by a cascade of local binary patterns that comes with scikit-image. Fast, without weights
    to download, and far from finding all: side views, small and covered faces escape it."""
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
    """A copy of a uint8 image [H, W, 3] in which the faces are blurred."""
    cv2 = require("cv2", extra="curate", purpose="blurring faces")
    result = image.astype(np.float32)
    for box in boxes:
        side = SHARE * max(box.width, box.height)
        mask = np.zeros(image.shape[:2], np.float32)
        top, left = max(round(box.y - side), 0), max(round(box.x - side), 0)
        mask[top : max(round(box.y + box.height + side), 0), left : max(round(box.x + box.width + side), 0)] = 1
        mask = cv2.GaussianBlur(mask, (0, 0), max(side, 0.5))[..., None]
        result = mask * cv2.GaussianBlur(result, (0, 0), max(side, 0.5)) + (1 - mask) * result
    blurred: npt.NDArray[np.uint8] = np.clip(np.rint(result), 0, 255).astype(np.uint8)
    return blurred


def blurred_file(content: bytes, boxes: Sequence[Box]) -> bytes:
    """An image file with its faces blurred: upright, a JPEG of quality 95 where it was one, else a PNG."""
    with Image.open(io.BytesIO(content)) as image:
        kind = "JPEG" if image.format in ("JPEG", "MPO") else "PNG"
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    file = io.BytesIO()
    Image.fromarray(blur_faces(pixels, boxes)).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()
