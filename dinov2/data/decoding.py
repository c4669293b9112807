"""Decoding of image files to arrays. Files, shards and datasets follow the same rules.

Training asks for a number of channels:

- 3: 8-bit RGB from any file; grey is repeated, transparency is dropped, 16 bits are reduced to their upper 8.
- 1: grey, in the file's own depth; colour is reduced to luma.
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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov2_kernels._extras import require

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
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # either byte order, either size of offsets


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
    with _as_unreadable(repr(os.fspath(path))), open(path, "rb") as file:
        return _decode(file, channels)


def decode_image(content: bytes, name: str, channels: int = 3) -> Pixels:
    """Decode a file's bytes like :func:`read_image`; errors call the image ``name``."""
    with _as_unreadable(name):
        return _decode(io.BytesIO(content), channels)


def read_header(content: bytes, name: str) -> ImageHeader:
    """Size and format of an image file; its pixels may still be damaged. Errors are those of :func:`decode_image`.

    The size is that of the stored pixels, before the orientation is applied.
    """
    file = io.BytesIO(content)
    with _as_unreadable(name):
        if content.startswith(_NPY):
            height, width = _npy_shape(file)[:2]
            return ImageHeader(width, height, ".npy")
        try:
            with _open(file) as image:
                return ImageHeader(*image.size, _PILLOW_FORMATS[image.format or ""])
        except UnidentifiedImageError:
            if not content.startswith(_TIFF):
                raise
        file.seek(0)
        with _open_tiff(file) as tiff:  # a kind of TIFF that Pillow does not read
            height, width = _tiff_sizes(tiff)
            return ImageHeader(width, height, ".tif")


@contextlib.contextmanager
def _as_unreadable(name: str) -> Iterator[None]:
    """Turn any error of a decoder into an UnreadableImageError, except a missing package."""
    try:
        yield
    except ImportError:
        raise
    except UnidentifiedImageError as error:  # its message is the repr of a file object
        raise UnreadableImageError(f"cannot read image {name}: its format is unknown, or it is damaged") from error
    except OSError as error:
        raise UnreadableImageError(f"cannot read image {name}: {error.strerror or error}") from error
    except Exception as error:
        raise UnreadableImageError(f"cannot read image {name}: {error}") from error


def _open(file: BinaryIO) -> Image.Image:
    return Image.open(file, formats=_known_formats())


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
    if magic.startswith(_TIFF) and channels not in (1, 3):
        return _of_channels(_read_tiff(file), channels)
    with _open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)  # in place: a copy takes a tenth of the decoding time
        if image.mode == "I" or (image.mode == "F" and channels == 3):
            raise ValueError(f"32 bits per channel (Pillow mode {image.mode}) have no defined range")
        if channels == 3:
            return np.asarray(_as_rgb(image))
        if channels == 1 and not image.mode.startswith(("I;16", "F")):
            return _of_channels(np.asarray(image.convert("L")), channels)
        return _of_channels(np.asarray(image), channels)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # convert would copy the image
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_upper_8_bits(np.asarray(image)))
    return image.convert("RGB")


def _of_channels(pixels: npt.NDArray[Any], channels: int) -> Pixels:
    """Check an array from a file and return it as ``[H, W, channels]`` in this machine's byte order."""
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.size == 0:
        raise ValueError(f"pixels: expected [H, W, {channels}], got {list(pixels.shape)}")
    native = pixels.dtype.newbyteorder("=")
    if native not in LEVELS:
        raise ValueError(f"pixels: expected {', '.join(map(str, LEVELS))}, got {native}")
    if channels == 3 and native == np.uint16:
        return _upper_8_bits(pixels)
    if channels == 3 and native != np.uint8:
        raise ValueError(f"RGB: expected 8 or 16 bits per channel, got {native}")
    if native == np.float32 and not np.isfinite(pixels).all():
        raise ValueError("it holds a NaN or an infinity")
    return np.ascontiguousarray(pixels, dtype=native)


def _upper_8_bits(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return (pixels >> 8).astype(np.uint8)


def _npy_shape(file: BinaryIO) -> tuple[int, ...]:
    """The shape in the header of a ``.npy`` file; a shape with too many pixels raises an error."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(file))
    if read is None:
        raise ValueError("the version of its format is unknown")
    shape, _, dtype = read(file)
    if len(shape) not in (2, 3) or dtype.newbyteorder("=") not in LEVELS:
        raise ValueError(
            f"array: expected [H, W] or [H, W, C] of {', '.join(map(str, LEVELS))}, got {dtype} {list(shape)}"
        )
    _refuse_bomb(math.prod(shape[:2]))
    return tuple(shape)


def _read_npy(file: BinaryIO) -> npt.NDArray[Any]:
    _npy_shape(file)
    file.seek(0)
    array: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    return array


def _open_tiff(file: BinaryIO) -> Any:
    return require("tifffile", extra="data", purpose="reading TIFF files of many channels").TiffFile(file)


def _tiff_sizes(tiff: Any) -> tuple[int, int]:
    """Height and width of a TIFF with one image; bands may be stored by pixel, by band or one per page."""
    series = tiff.series[0]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    bands = [axis for axis in series.axes if axis not in "YX" and sizes[axis] > 1]
    if not {"Y", "X"} <= sizes.keys() or len(bands) > 1:
        raise ValueError(f"axes: expected rows, columns and bands, got {sizes}")
    _refuse_bomb(sizes["Y"] * sizes["X"])
    return sizes["Y"], sizes["X"]


def _read_tiff(file: BinaryIO) -> npt.NDArray[Any]:
    with _open_tiff(file) as tiff:
        height, width = _tiff_sizes(tiff)
        axes = tiff.series[0].axes
        pixels: npt.NDArray[Any] = np.moveaxis(tiff.series[0].asarray(), [axes.index("Y"), axes.index("X")], [0, 1])
    return pixels.reshape(height, width, -1)


def _refuse_bomb(pixels: int) -> None:
    """Apply Pillow's limit to formats that other libraries decode."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{pixels} pixels could be a decompression bomb; Pillow's limit is {Image.MAX_IMAGE_PIXELS}")
