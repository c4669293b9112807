"""Decoding of image files to arrays. Files, shards and datasets follow the same rules.

Training asks for a number of channels:

- 3: 8-bit RGB from any file; grey is repeated, transparency is dropped, 16 bits are reduced to their upper 8; before
  that they are stretched, if the file says that it uses fewer.
- 1: grey, in the file's own depth; colour is reduced to luma, of 8 bits.
- any other number: the file must have this number of channels and keeps its depth: arrays (``.npy``), TIFF with any
  number of bands, or images that Pillow reads with four channels (RGBA, CMYK).

The content decides the format, not the file name.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov2.data.files import quoted
from dinov2.data.formats import ARRAY, NPY, extension_of, known_formats, refusal, words_of
from dinov2.data.layouts import (
    TIFF,
    TIFF_OF_PILLOW,
    bits_of_png,
    corrected,
    open_tiff,
    pillow_reads,
    read_deep_netpbm,
    read_tiff_bands,
    read_tiff_colours,
    refuse_bomb,
    stretched_png,
    tiff_sizes,
)
from dinov2.data.remarks import native_overheard, overheard, plain, remark

LEVELS: dict[np.dtype[Any], float] = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}
"""Each dtype of pixels, and its level that counts as 1: mean and std are on this scale."""

Pixels = npt.NDArray[Any]  # [H, W, C] in a dtype of LEVELS


FEW_BITS = 12
"""If no level of 16 bits uses more than so many, the upper 8 bits are almost black."""


class UnreadableImageError(ValueError):
    """An image file is damaged, too large to be safe, or in an unsupported format.

    Attributes:
        words: the reason without the name of the image.
    """

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words or message


@dataclass(frozen=True)
class ImageHeader:
    """Size and format of an image file, read without decoding its pixels."""

    width: int
    height: int
    extension: str  # extension of its format in lower case, with the dot: such as .jpg


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Pixels:
    """Decode an image file to ``[H, W, channels]``: uint8, or for other than three channels also uint16 or float32.

    A camera's EXIF orientation is applied, so photographs are upright as in every viewer. (The reference implementation
    ignores it.) Only the first frame of an animation is read. Pillow's limit on the number of pixels applies. The top
    of this module describes colours and depths.

    Raises:
        UnreadableImageError: the file is missing, damaged, truncated, above Pillow's limit, has another number of
            channels or a dtype without a defined range, or holds a NaN or an infinity.
    """
    with as_unreadable(quoted(os.fspath(path))):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            return _decode(file, channels)


def decode_image(content: bytes, name: str, channels: int = 3) -> Pixels:
    """Decode a file's bytes like :func:`read_image`; errors call the image ``name``."""
    with as_unreadable(name):
        return _decode(io.BytesIO(content), channels)


def read_header(content: bytes, name: str) -> ImageHeader:
    """Size and format of an image file; its pixels may still be damaged. Errors are those of :func:`decode_image`.

    The size is that of the stored pixels, before the orientation is applied.
    """
    with as_unreadable(name, remarks=False):
        return _header(io.BytesIO(content))


def holds_image(file: BinaryIO) -> bool:
    """Whether the header of an image can be read from a file."""
    try:
        file.seek(0)
        _header(file)
    except Exception:  # readers raise errors of many types
        return False
    return True


def _header(file: BinaryIO) -> ImageHeader:
    magic = file.read(len(NPY))
    file.seek(0)
    if magic == NPY:
        height, width = npy_header(file)[0][:2]
        return ImageHeader(width, height, ARRAY)
    try:
        if magic.startswith(TIFF) and not magic.startswith(TIFF_OF_PILLOW):
            raise UnidentifiedImageError
        with open_image(file) as image:
            size, extension = image.size, extension_of(image)
    except UnidentifiedImageError:
        if not magic.startswith(TIFF):
            raise
        with open_tiff(file) as tiff:  # a kind of TIFF that Pillow does not read
            height, width = tiff_sizes(tiff)
        size, extension = (width, height), ".tif"
    if 0 in size:
        raise ValueError(f"size: expected at least one pixel, got {size[0]} x {size[1]}")
    return ImageHeader(*size, extension)


@contextlib.contextmanager
def as_unreadable(name: str, remarks: bool = True) -> Iterator[None]:
    """Turn any error of a decoder into an UnreadableImageError, except a missing package.

    What libraries said meanwhile is part of the error. Without an error it is a remark on the image; a header is read
    without ``remarks``, because the same is said again when the pixels are decoded.
    """
    failure: Exception | None = None
    with overheard() as said:
        try:
            yield
        except ImportError:
            raise
        except Exception as error:
            failure = error
    if failure is not None:
        words = "; ".join([plain(_in_words(failure)), *said])
        raise UnreadableImageError(f"cannot read image {name}: {words}", words) from failure
    if said and remarks:
        remark(name, said)


def _in_words(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        known = ", ".join(sorted({*known_formats()} - {"DIB"}))
        return f"its format is unknown, or it is damaged; expected one of {known} or NPY{error}"
    return (isinstance(error, OSError) and error.strerror) or words_of(error)


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image.

    Raises:
        UnidentifiedImageError: the format is unknown; its text, which may be empty, is the reason of the format that
            the file begins like.
        ValueError: the file is empty.
    """
    try:
        return Image.open(file, formats=known_formats())
    except UnidentifiedImageError:
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError("the file is empty") from None
        raise UnidentifiedImageError(refusal(file)) from None


def _decode(file: BinaryIO, channels: int) -> Pixels:
    magic = file.read(len(NPY))
    file.seek(0)
    if magic == NPY:
        return _of_channels(_read_npy(file), channels)
    if magic.startswith(TIFF):
        return _decode_tiff(file, magic, channels)
    bits = bits_of_png(file)
    with open_image(file) as image:
        if image.format == "PPM" and (levels := read_deep_netpbm(file)) is not None:
            return of_colours(levels, channels)
        return _of_pillow(image, channels, bits)


def _decode_tiff(file: BinaryIO, magic: bytes, channels: int) -> Pixels:
    if channels not in (1, 3):
        return _of_channels(read_tiff_bands(file, channels), channels)
    if magic.startswith(TIFF_OF_PILLOW):
        with contextlib.suppress(UnidentifiedImageError), open_image(file) as image:
            if pillow_reads(image):
                with native_overheard():  # libtiff writes to the standard error
                    return _of_pillow(image, channels)
    return of_colours(read_tiff_colours(file), channels)


def _of_pillow(image: Image.Image, channels: int, bits_of_png: int = 16) -> Pixels:
    """Decode an opened image."""
    deep = has_deep_colours(image)
    ImageOps.exif_transpose(image, in_place=True)  # in place: a copy takes a tenth of the decoding time
    image = convertible(image, image, channels, bits_of_png)
    if channels == 3:
        pixels = np.asarray(as_rgb(image))
        if deep and pixels.max() < 2**FEW_BITS >> 8:
            _warn_of_darkness()
        return pixels
    if channels == 1 and not image.mode.startswith(("I;16", "F")):
        return _of_channels(np.asarray(_without_transparency(image).convert("L")), channels)
    return _of_channels(np.asarray(image), channels)


def convertible(part: Image.Image, image: Image.Image, channels: int, bits_of_png: int = 16) -> Image.Image:
    """A part of an opened image, or all of it, in a mode that Pillow converts rightly."""
    part = corrected(part, getattr(image, "tag_v2", {}))
    if part.mode == "I" and image.format == "PNG":  # Pillow before 11: 16 bits of grey
        part = Image.fromarray(np.asarray(part).astype(np.uint16))
    if bits_of_png < 16:
        part = Image.fromarray(stretched_png(np.asarray(part), bits_of_png))
    if part.mode == "I" or (part.mode == "F" and channels == 3):
        raise ValueError(f"32 bits per channel (Pillow mode {part.mode}) have no defined range")
    if part.mode == "La":
        part = part.convert("LA")  # colours that are multiplied by their opacity convert to nothing else
    return part


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an opened image has colours of 16 bits, of which Pillow takes the upper 8: it has no such images."""
    return not image.mode.startswith("I") and ";16" in str(getattr(image, "tile", ""))


def of_colours(levels: npt.NDArray[Any], channels: int) -> Pixels:
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


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of Pillow in RGB, without its transparency."""
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
    native = check_channels(pixels, channels)
    if channels == 3 and native == np.uint16:
        return _upper_8_bits(pixels)
    if native == np.float32 and not np.isfinite(pixels).all():
        raise ValueError("it holds a NaN or an infinity")
    return np.ascontiguousarray(pixels, dtype=native)


def check_channels(pixels: npt.NDArray[Any], channels: int) -> np.dtype[Any]:
    """Raise a ValueError unless an array has the shape and a dtype of ``channels``; the dtype in native byte order."""
    if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.size == 0:
        raise ValueError(f"pixels: expected [H, W, {channels}], got {list(pixels.shape)}")
    native: np.dtype[Any] = pixels.dtype.newbyteorder("=")
    if native not in LEVELS:
        raise ValueError(f"pixels: expected {', '.join(map(str, LEVELS))}, got {native}")
    if channels == 3 and native not in (np.uint8, np.uint16):
        raise ValueError(f"RGB: expected 8 or 16 bits per channel, got {native}")
    return native


def _upper_8_bits(levels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if int(levels.max(initial=0)) < 2**FEW_BITS:
        _warn_of_darkness()
    return (levels >> 8).astype(np.uint8)


def _warn_of_darkness() -> None:
    warnings.warn(
        f"an image of 16 bits has no level above {2**FEW_BITS - 1} of 65535, so it becomes almost black; if its levels"
        " have fewer bits, its file has to say so, or they have to be stretched (docs/data.md, Depths and layouts)",
        stacklevel=3,
    )


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
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
    npy_header(file)
    file.seek(0)
    array: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    return array
