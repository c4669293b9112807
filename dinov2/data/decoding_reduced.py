"""Decoding of image files at a reduced size, in less time and memory than at their own.

Curation looks at images in this way, and so do people: in its report, and in files with blurred faces.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dinov2.data.decoding import (
    as_rgb,
    as_unreadable,
    check_channels,
    convertible,
    has_deep_colours,
    npy_header,
    of_colours,
    open_image,
)
from dinov2.data.formats import NPY
from dinov2.data.layouts import (
    TIFF,
    TIFF_OF_PILLOW,
    bits_of_png,
    pillow_reads,
    read_deep_netpbm,
    read_tiff_colours,
    tiff_bytes,
)
from dinov2.data.reducing import read_smaller, reduced, refuse_large, stored_bytes, target_size
from dinov2.data.remarks import native_overheard

MIN_USED, MAX_USED = 10, 14
"""If an image of 16 bits uses so many of them, the upper 8 of those count."""


class Reduced(NamedTuple):
    """An image at a reduced size.

    Attributes:
        pixels: uint8 RGB ``[h, w, 3]``, upright.
        width: width of the upright image in full.
        height: height of the upright image in full.
    """

    pixels: npt.NDArray[np.uint8]
    width: int
    height: int


def decode_reduced(content: bytes, name: str, side: int, least: int = 0) -> Reduced:
    """Decode a file's bytes to upright uint8 RGB whose longer side has at most ``side`` pixels.

    It follows the rules of :func:`~dinov2.data.decode_image` with three channels, and an image that is small enough has
    the same pixels. JPEG and JPEG 2000 are decoded at a fraction of their size, which takes less time and memory. Other
    formats are decoded in full and reduced in parts.

    Images of 16 bits whose levels use up to 14 of them differ. Their upper 8 bits are dark, and those of 12 bits look
    like a plain black image. Here the upper 8 of the bits that they use count, of at least 10, so that the noise of a
    black image stays black.

    Args:
        content: bytes of an image file.
        name: name of the image in errors.
        side: pixels of the longer side; no image is enlarged.
        least: pixels that the shorter side keeps if it had them, even if the longer side then exceeds ``side``.

    Raises:
        UnreadableImageError: as for :func:`~dinov2.data.decode_image`; also if decoding would take more than about
            1 GiB of memory.

    Example:
        >>> image = decode_reduced(content, "a.jpg", 768)  # of 4000 x 3000 pixels
        >>> image.pixels.shape, image.width, image.height
        ((576, 768, 3), 4000, 3000)
    """
    with as_unreadable(name):
        small, width, height = _read_reduced(content, side, least)
        return Reduced(np.asarray(small), width, height)


def decode_picture(content: bytes, name: str) -> Image.Image:
    """Decode a file's bytes like :func:`decode_reduced`, but in full, to an upright RGB image of Pillow.

    It takes 4 bytes a pixel, and has no metadata. Errors are those of :func:`decode_reduced`.
    """
    with as_unreadable(name):
        picture, *_ = _read_reduced(content, sys.maxsize, 0)
        picture.info.clear()
        return picture


def _read_reduced(content: bytes, side: int, least: int) -> tuple[Image.Image, int, int]:
    """An RGB image at a reduced size, and the size of the upright image in full."""
    file = io.BytesIO(content)
    if content.startswith(NPY):
        return _reduced_array(_view_npy(content), side, least)
    if content.startswith(TIFF_OF_PILLOW) or not content.startswith(TIFF):
        try:
            with open_image(file) as image:
                if image.format == "PPM":
                    refuse_large(2 * image.width * image.height * len(image.getbands()), content)
                    if (levels := read_deep_netpbm(file)) is not None:
                        return _reduced_array(levels, side, least)
                if image.format == "PNG" and image.mode == "RGB" and has_deep_colours(image):
                    refuse_large(12 * image.width * image.height, content)
                    return _reduced_array(_colours_of_png(file), side, least)
                if image.format != "TIFF" or (pillow_reads(image) and not has_deep_colours(image)):
                    return _reduced_by_pillow(image, content, side, least)
        except UnidentifiedImageError:
            if not content.startswith(TIFF):
                raise
    refuse_large(tiff_bytes(file), content)
    return _reduced_array(read_tiff_colours(file), side, least)


def _reduced_by_pillow(image: Image.Image, content: bytes, side: int, least: int) -> tuple[Image.Image, int, int]:
    full = image.size
    read_smaller(image, target_size(*full, side, least), content)
    with native_overheard() if image.format == "TIFF" else contextlib.nullcontext():  # libtiff uses the standard error
        image.load()
    if image.format == "TIFF":
        full = image.size  # Pillow turns TIFF upright while it loads
    elif (orientation := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
        refuse_large(2 * stored_bytes(image) * image.width * image.height, content)
        full = full[::-1] if orientation in (5, 6, 7, 8) else full
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        levels = np.asarray(convertible(image, image, 3, bits_of_png(io.BytesIO(content))))
        return _reduced_array(levels[..., None], side, least)

    def part(top: int, bottom: int) -> Image.Image:
        rows = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        return as_rgb(convertible(rows, image, 3))

    return reduced(part, *image.size, target_size(*full, side, least)), *full


def _reduced_array(levels: npt.NDArray[Any], side: int, least: int) -> tuple[Image.Image, int, int]:
    """Reduce levels uint8 or uint16, of grey ``[H, W, 1]`` or RGB ``[H, W, 3]``."""
    height, width = levels.shape[:2]
    lower = 0  # bits below those that count
    if levels.dtype.newbyteorder("=") == np.uint16:
        used = max(MIN_USED, int(levels.max()).bit_length())
        lower = used - 8 if used <= MAX_USED else 8

    def part(top: int, bottom: int) -> Image.Image:
        rows = (levels[top:bottom] >> lower).astype(np.uint8) if lower else levels[top:bottom]
        return Image.fromarray(of_colours(rows, 3))

    return reduced(part, width, height, target_size(width, height, side, least)), width, height


def _colours_of_png(file: BinaryIO) -> npt.NDArray[np.uint16]:
    """Colours of 16 bits [H, W, 3]. Pillow has no such images, but it takes either byte of a level."""
    upper, lower = (_bytes_of_png(file, order) for order in ("RGB;16B", "RGB;16L"))
    levels: npt.NDArray[np.uint16] = (upper << 8) | lower
    return levels


def _bytes_of_png(file: BinaryIO, order: str) -> npt.NDArray[Any]:
    file.seek(0)
    with open_image(file) as image:
        image.tile = [(*tile[:3], order) for tile in image.tile]  # type: ignore[attr-defined]
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image).astype(np.uint16)


def _view_npy(content: bytes) -> npt.NDArray[Any]:
    """The RGB array in a ``.npy`` file, without a copy."""
    file = io.BytesIO(content)
    shape, columns_first, dtype = npy_header(file)
    refuse_large(0, content)
    levels = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    array: npt.NDArray[Any] = levels.reshape(shape, order="F" if columns_first else "C")
    check_channels(array, 3)
    return array
