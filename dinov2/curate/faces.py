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
from dinov2.curate.published import CENTERFACE, open_centerface
from dinov2.data.decoding import Pixels, read_header
from dinov2.data.decoding_reduced import decode_picture
from dinov2.extras import require

DETECTION_SIDE = 320  # pixels of the longer side that the bundled detector looks at
SMALLEST_FACE = 24  # side of the smallest face, in pixels of the reduced image
SHARE = 0.1  # part of a box's longer side by which it grows and is blurred
REACH = 8  # standard deviations around a box that affect its blur and the blur of its mask
PART_PIXELS = 2**20  # pixels that are blended at once
AREA, LINEAR = 3, 1  # OpenCV's numbers of its filters
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
        ValueError: the detector cannot be imported, or the file is not CenterFace.
        ImportError: a package is missing; the message says how to install it.
    """
    if name in ("none", ""):
        return None
    if name == "bundled":
        require("skimage.feature", extra="curate", purpose="finding faces")
        return bundled_detector
    if name == CENTERFACE.name or name.endswith(".onnx"):
        find = open_centerface(str(CENTERFACE.file()) if name == CENTERFACE.name else name)
        return lambda images: [[_around(face) for face in find(image).tolist()] for image in images]
    function = load_function(name)
    return lambda images: [[Box(*map(int, box)) for box in boxes] for boxes in function(images)]


def _around(face: list[float]) -> Box:
    """The box of whole pixels around left, top, right and bottom."""
    left, top = math.floor(face[0]), math.floor(face[1])
    return Box(left, top, math.ceil(face[2]) - left, math.ceil(face[3]) - top)


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
        _blur_box(box, result.shape[0], result.shape[1], result.__getitem__, result.__setitem__)
    return result


Part = tuple[slice, slice]  # rows and columns


def _blur_box(
    box: Box, height: int, width: int, read: Callable[[Part], Pixels], write: Callable[[Part, Pixels], None]
) -> None:
    """Blur a face of an image of which parts can be read and written. Some rows at a time of the part that changes are
    held as floats, so that memory does not grow with the face."""
    cv2 = require("cv2", extra="curate", purpose="blurring faces")
    side = SHARE * max(box.width, box.height)
    sigma = max(side, 0.5)
    margin = math.ceil(REACH * sigma)  # no pixel beyond it changes
    across = _Extent(box.x - side, box.x + box.width + side, margin, width)
    down = _Extent(box.y - side, box.y + box.height + side, margin, height)
    if not (across.length and down.length):
        return
    # A wide blur works on a smaller image, so time does not grow with sigma. The sides of the smaller image are whole
    # numbers, so its pixels may be a little narrower or lower than ``step``.
    step = max(int(sigma / FINEST_SIGMA), 1)
    size = (math.ceil(across.length / step), math.ceil(down.length / step))
    rows = max(1, PART_PIXELS // across.length)
    parts = [slice(top, min(top + rows, down.stop)) for top in range(down.start, down.stop, rows)]
    columns = slice(across.start, across.stop)
    narrow = np.concatenate(
        [
            cv2.resize(read((part, columns)).astype(np.float32), (size[0], part.stop - part.start), interpolation=AREA)
            for part in parts
        ]
    )
    small = cv2.resize(narrow, size, interpolation=AREA)
    sigmas = (sigma * size[0] / across.length, sigma * size[1] / down.length)
    small = cv2.GaussianBlur(small, (0, 0), sigmas[0], sigmaY=sigmas[1])
    wide = cv2.resize(small, (across.length, size[1]), interpolation=LINEAR).reshape(size[1], across.length, 3)
    mask_across, mask_down = across.mask(size[0], sigmas[0]), down.mask(size[1], sigmas[1])
    places = np.clip((np.arange(down.length) + 0.5) * (size[1] / down.length) - 0.5, 0, size[1] - 1)
    above = np.minimum(places.astype(int), max(size[1] - 2, 0))
    shares = (places - above).astype(np.float32)[:, None, None]
    for part in parts:
        own = slice(part.start - down.start, part.stop - down.start)
        upper, lower = wide[above[own]], wide[np.minimum(above[own] + 1, size[1] - 1)]
        pixels = read((part, columns)).astype(np.float32)
        mask = mask_down[own, None, None] * mask_across[None, :, None]
        pixels += mask * (upper + shares[own] * (lower - upper) - pixels)
        write((part, columns), np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


class _Extent:
    """The rows or columns of an image that change with a box.

    Args:
        first: where the grown box begins.
        end: where it ends.
        margin: pixels around it that change too.
        length: rows or columns of the image.
    """

    def __init__(self, first: float, end: float, margin: int, length: int) -> None:
        self.box = slice(max(round(first), 0), max(round(end), 0))
        self.start, self.stop = max(self.box.start - margin, 0), min(self.box.stop + margin, length)
        self.length = max(self.stop - self.start, 0)

    def mask(self, size: int, sigma: float) -> npt.NDArray[np.float32]:
        """The blurred mask of the box along this extent, [length], computed at ``size`` pixels."""
        cv2 = require("cv2", extra="curate", purpose="blurring faces")
        mask = np.zeros((1, self.length), np.float32)
        mask[0, self.box.start - self.start : self.box.stop - self.start] = 1
        small = cv2.GaussianBlur(cv2.resize(mask, (size, 1), interpolation=AREA), (0, 0), sigma)
        whole: npt.NDArray[np.float32] = cv2.resize(small, (self.length, 1), interpolation=LINEAR)[0]
        return whole


def blurred_file(content: bytes, boxes: Sequence[Box]) -> bytes:
    """Blur the faces of an image file. The result is upright 8-bit RGB, as the faces were found in: a JPEG of quality
    95 if the file was a JPEG, else a PNG.

    Raises:
        UnreadableImageError: the file cannot be decoded.
    """
    kind = "JPEG" if read_header(content, "file").extension == ".jpg" else "PNG"
    picture = decode_picture(content, "file")

    def read(part: Part) -> Pixels:
        rows, columns = part
        return np.asarray(picture.crop((columns.start, rows.start, columns.stop, rows.stop)))

    def write(part: Part, pixels: Pixels) -> None:
        picture.paste(Image.fromarray(pixels), (part[1].start, part[0].start))

    for box in boxes:
        _blur_box(box, picture.height, picture.width, read, write)
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()
