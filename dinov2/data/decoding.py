"""Decoding of image files to arrays. Files, shards and datasets follow the same rules.

Training asks for a number of channels:

- 3: 8-bit RGB from any file; grey is repeated, transparency is dropped, 16 bits are reduced to their upper 8.
- 1: grey, in the file's own depth; colour is reduced to luma, of 8 bits.
- any other number: the file must have this number of channels and keeps its depth: arrays (``.npy``), TIFF with any
  number of bands, or images that Pillow reads with four channels (RGBA, CMYK).

The content decides the format, not the file name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dinov2.data.files import quoted
from dinov2.data.layouts import (
    TIFF,
    TIFF_OF_PILLOW,
    corrected,
    open_tiff,
    pillow_reads,
    read_deep_netpbm,
    read_tiff_bands,
    read_tiff_colours,
    refuse_bomb,
    tiff_bytes,
    tiff_sizes,
)
from dinov2.data.reducing import read_smaller, reduced, refuse_large, stored_bytes, target_size

IMAGE_EXTENSIONS = (
    ".avif",
    ".bmp",
    ".gif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".npy",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
# Pillow reads more formats, but starts other programs for some of them, which is unsafe for files from the web.
_PILLOW_FORMATS = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "JPEG": ".jpg",
    "JPEG2000": ".jp2",
    "MPO": ".jpg",
    "PNG": ".png",
    "PPM": ".ppm",
    "TIFF": ".tif",
    "WEBP": ".webp",
}
LEVELS: dict[np.dtype[Any], float] = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}
"""Each dtype of pixels, and its level that counts as 1: mean and std are on this scale."""

Pixels = npt.NDArray[Any]  # [H, W, C] in a dtype of LEVELS

_NPY = b"\x93NUMPY"


class UnreadableImageError(ValueError):
    """An image file is damaged, too large to be safe, or in an unsupported format."""


@dataclass(frozen=True)
class ImageHeader:
    """Size and format of an image file, read without decoding its pixels."""

    width: int
    height: int
    extension: str  # extension of its format in lower case, with the dot: one of IMAGE_EXTENSIONS


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Pixels:
    """Decode an image file to ``[H, W, channels]``: uint8, or for other than three channels also uint16 or float32.

    A camera's EXIF orientation is applied, so photographs are upright as in every viewer. (The reference implementation
    ignores it.) Only the first frame of an animation is read. Pillow's limit on the number of pixels applies. The top
    of this module describes colours and depths.

    Raises:
        UnreadableImageError: the file is missing, damaged, truncated, above Pillow's limit, has another number of
            channels or a dtype without a defined range, or holds a NaN or an infinity.
    """
    with _as_unreadable(quoted(os.fspath(path))):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            return _decode(file, channels)


def decode_image(content: bytes, name: str, channels: int = 3) -> Pixels:
    """Decode a file's bytes like :func:`read_image`; errors call the image ``name``."""
    with _as_unreadable(name):
        return _decode(io.BytesIO(content), channels)


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

    It follows the rules of :func:`decode_image` with three channels, and an image that is small enough has the same
    pixels. JPEG and JPEG 2000 are decoded at a fraction of their size, which takes less time and memory. Other formats
    are decoded in full and reduced in parts.

    Args:
        content: bytes of an image file.
        name: name of the image in errors.
        side: pixels of the longer side; no image is enlarged.
        least: pixels that the shorter side keeps if it had them, even if the longer side then exceeds ``side``.

    Raises:
        UnreadableImageError: as for :func:`decode_image`; also if decoding would take more than about 1 GiB of memory.

    Example:
        >>> image = decode_reduced(content, "a.jpg", 768)  # of 4000 x 3000 pixels
        >>> image.pixels.shape, image.width, image.height
        ((576, 768, 3), 4000, 3000)
    """
    with _as_unreadable(name):
        small, width, height = _read_reduced(content, side, least)
        return Reduced(np.asarray(small), width, height)


def decode_picture(content: bytes, name: str) -> Image.Image:
    """Decode a file's bytes like :func:`decode_image` with three channels, to an upright RGB image of Pillow.

    It takes 4 bytes a pixel, and has no metadata. Errors are those of :func:`decode_reduced`.
    """
    with _as_unreadable(name):
        picture, *_ = _read_reduced(content, sys.maxsize, 0)
        picture.info.clear()
        return picture


def read_header(content: bytes, name: str) -> ImageHeader:
    """Size and format of an image file; its pixels may still be damaged. Errors are those of :func:`decode_image`.

    The size is that of the stored pixels, before the orientation is applied.
    """
    file = io.BytesIO(content)
    with _as_unreadable(name):
        if content.startswith(_NPY):
            height, width = _npy_header(file)[0][:2]
            return ImageHeader(width, height, ".npy")
        try:
            if content.startswith(TIFF) and not content.startswith(TIFF_OF_PILLOW):
                raise UnidentifiedImageError
            with _open(file) as image:
                size, extension = image.size, _PILLOW_FORMATS[image.format or ""]
        except UnidentifiedImageError:
            if not content.startswith(TIFF):
                raise
            with open_tiff(file) as tiff:  # a kind of TIFF that Pillow does not read
                height, width = tiff_sizes(tiff)
            size, extension = (width, height), ".tif"
        if 0 in size:
            raise ValueError(f"size: expected at least one pixel, got {size[0]} x {size[1]}")
        return ImageHeader(*size, extension)


@contextlib.contextmanager
def _as_unreadable(name: str) -> Iterator[None]:
    """Turn any error of a decoder into an UnreadableImageError, except a missing package."""
    try:
        yield
    except ImportError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f"cannot read image {name}: its format is unknown, or it is damaged; expected one of"
            f" {', '.join(sorted(_known_formats()))} or NPY{error}"
        ) from error
    except OSError as error:
        raise UnreadableImageError(f"cannot read image {name}: {error.strerror or error}") from error
    except Exception as error:
        raise UnreadableImageError(f"cannot read image {name}: {error}") from error


def _open(file: BinaryIO) -> Image.Image:
    """Open an image.

    Raises:
        UnidentifiedImageError: the format is unknown; its text, which may be empty, is the reason of the format that
            the file begins like.
    """
    try:
        return Image.open(file, formats=_known_formats())
    except UnidentifiedImageError:
        raise UnidentifiedImageError(_refusal(file)) from None


def _refusal(file: BinaryIO) -> str:
    """The reader's words about a file that begins like its format, such as ``; JPEG: cannot handle 12-bit layers``."""
    file.seek(0)
    beginning = file.read(16)
    for name in _known_formats():
        reader, accept = Image.OPEN[name]
        if accept is not None and accept(beginning) is True:
            file.seek(0)
            try:
                reader(file, "")
            except Exception as error:  # readers raise errors of many types
                return f"; {name}: {error}"
    return ""


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """The formats that this version of Pillow can open; MPO is opened as JPEG."""
    Image.init()
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def _decode(file: BinaryIO, channels: int) -> Pixels:
    magic = file.read(len(_NPY))
    file.seek(0)
    if magic == _NPY:
        return _of_channels(_read_npy(file), channels)
    if magic.startswith(TIFF):
        return _decode_tiff(file, magic, channels)
    with _open(file) as image:
        if image.format == "PPM" and (levels := read_deep_netpbm(file)) is not None:
            return _of_colours(levels, channels)
        return _of_pillow(image, channels)


def _decode_tiff(file: BinaryIO, magic: bytes, channels: int) -> Pixels:
    if channels not in (1, 3):
        return _of_channels(read_tiff_bands(file, channels), channels)
    if magic.startswith(TIFF_OF_PILLOW):
        with contextlib.suppress(UnidentifiedImageError), _open(file) as image:
            if pillow_reads(image):
                return _of_pillow(image, channels)
    return _of_colours(read_tiff_colours(file), channels)


def _read_reduced(content: bytes, side: int, least: int) -> tuple[Image.Image, int, int]:
    """An RGB image at a reduced size, and the size of the upright image in full."""
    file = io.BytesIO(content)
    if content.startswith(_NPY):
        return _reduced_array(_view_npy(content), side, least)
    if content.startswith(TIFF_OF_PILLOW) or not content.startswith(TIFF):
        try:
            with _open(file) as image:
                if image.format == "PPM":
                    refuse_large(2 * image.width * image.height * len(image.getbands()), content)
                    if (levels := read_deep_netpbm(file)) is not None:
                        return _reduced_array(levels, side, least)
                if image.format != "TIFF" or pillow_reads(image):
                    return _reduced_by_pillow(image, content, side, least)
        except UnidentifiedImageError:
            if not content.startswith(TIFF):
                raise
    refuse_large(tiff_bytes(file), content)
    return _reduced_array(read_tiff_colours(file), side, least)


def _reduced_by_pillow(image: Image.Image, content: bytes, side: int, least: int) -> tuple[Image.Image, int, int]:
    full = image.size
    read_smaller(image, target_size(*full, side, least), content)
    image.load()
    if image.format == "TIFF":
        full = image.size  # Pillow turns TIFF upright while it loads
    elif (orientation := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
        refuse_large(2 * stored_bytes(image) * image.width * image.height, content)
        full = full[::-1] if orientation in (5, 6, 7, 8) else full
    ImageOps.exif_transpose(image, in_place=True)

    def part(top: int, bottom: int) -> Image.Image:
        rows = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        return _as_rgb(_convertible(rows, image, 3))

    return reduced(part, *image.size, target_size(*full, side, least)), *full


def _reduced_array(levels: npt.NDArray[Any], side: int, least: int) -> tuple[Image.Image, int, int]:
    """Reduce levels uint8 or uint16, of grey ``[H, W, 1]`` or RGB ``[H, W, 3]``."""
    height, width = levels.shape[:2]

    def part(top: int, bottom: int) -> Image.Image:
        return Image.fromarray(_of_colours(levels[top:bottom], 3))

    return reduced(part, width, height, target_size(width, height, side, least)), width, height


def _of_pillow(image: Image.Image, channels: int) -> Pixels:
    """Decode an opened image."""
    ImageOps.exif_transpose(image, in_place=True)  # in place: a copy takes a tenth of the decoding time
    image = _convertible(image, image, channels)
    if channels == 3:
        return np.asarray(_as_rgb(image))
    if channels == 1 and not image.mode.startswith(("I;16", "F")):
        return _of_channels(np.asarray(_without_transparency(image).convert("L")), channels)
    return _of_channels(np.asarray(image), channels)


def _convertible(part: Image.Image, image: Image.Image, channels: int) -> Image.Image:
    """A part of an opened image, or all of it, in a mode that Pillow converts rightly."""
    part = corrected(part, getattr(image, "tag_v2", {}))
    if part.mode == "I" and image.format == "PNG":  # Pillow before 11: 16 bits of grey
        part = Image.fromarray(np.asarray(part).astype(np.uint16))
    if part.mode == "I" or (part.mode == "F" and channels == 3):
        raise ValueError(f"32 bits per channel (Pillow mode {part.mode}) have no defined range")
    if part.mode == "La":
        part = part.convert("LA")  # colours that are multiplied by their opacity convert to nothing else
    return part


def _of_colours(levels: npt.NDArray[Any], channels: int) -> Pixels:
    """Levels of grey ``[H, W, 1]`` or RGB ``[H, W, 3]``, uint8 or uint16, as the channels that are asked for."""
    if levels.dtype == np.float32 and channels == 3:
        raise ValueError("32 bits per channel (float32) have no defined range")
    if levels.shape[2] == channels or channels not in (1, 3):
        return _of_channels(levels, channels)
    if levels.dtype == np.uint16 and not (channels == 1 and levels.shape[2] == 1):
        levels = _upper_8_bits(levels)
    if channels == 3:
        return _of_channels(np.repeat(levels, 3, axis=2), channels)
    return _of_channels(np.asarray(Image.fromarray(np.ascontiguousarray(levels)).convert("L")), channels)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # convert would copy the image
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_upper_8_bits(np.asarray(image)))
    return _without_transparency(image).convert("RGB")


def _without_transparency(image: Image.Image) -> Image.Image:
    """The image without the transparency of its palette, about which Pillow would warn."""
    image.info.pop("transparency", None)
    return image


def _of_channels(pixels: npt.NDArray[Any], channels: int) -> Pixels:
    """Check an array from a file and return it as ``[H, W, channels]`` in this machine's byte order."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    native = _check_channels(pixels, channels)
    if channels == 3 and native == np.uint16:
        return _upper_8_bits(pixels)
    if native == np.float32 and not np.isfinite(pixels).all():
        raise ValueError("it holds a NaN or an infinity")
    return np.ascontiguousarray(pixels, dtype=native)


def _check_channels(pixels: npt.NDArray[Any], channels: int) -> np.dtype[Any]:
    """Raise a ValueError unless an array has the shape and a dtype of ``channels``; the dtype in native byte order."""
    if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.size == 0:
        raise ValueError(f"pixels: expected [H, W, {channels}], got {list(pixels.shape)}")
    native: np.dtype[Any] = pixels.dtype.newbyteorder("=")
    if native not in LEVELS:
        raise ValueError(f"pixels: expected {', '.join(map(str, LEVELS))}, got {native}")
    if channels == 3 and native not in (np.uint8, np.uint16):
        raise ValueError(f"RGB: expected 8 or 16 bits per channel, got {native}")
    return native


def _upper_8_bits(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return (pixels >> 8).astype(np.uint8)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape in the header of a ``.npy`` file, whether columns come first, and the dtype; a shape with too many
    pixels raises an error."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(file))
    if read is None:
        raise ValueError("the version of its format is unknown")
    shape, columns_first, dtype = read(file)
    if len(shape) not in (2, 3) or dtype.newbyteorder("=") not in LEVELS:
        raise ValueError(
            f"array: expected [H, W] or [H, W, C] of {', '.join(map(str, LEVELS))}, got {dtype} {list(shape)}"
        )
    if 0 in shape:
        raise ValueError(f"array: expected at least one pixel, got {list(shape)}")
    refuse_bomb(math.prod(shape[:2]))
    return tuple(shape), columns_first, dtype


def _read_npy(file: BinaryIO) -> npt.NDArray[Any]:
    _npy_header(file)
    file.seek(0)
    array: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    return array


def _view_npy(content: bytes) -> npt.NDArray[Any]:
    """The RGB array in a ``.npy`` file, without a copy."""
    file = io.BytesIO(content)
    shape, columns_first, dtype = _npy_header(file)
    refuse_large(0, content)
    levels = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    array: npt.NDArray[Any] = levels.reshape(shape, order="F" if columns_first else "C")
    _check_channels(array, 3)
    return array
