"""Layouts of pixels that Pillow does not read, or reads wrongly: Netpbm of more than 8 bits, and many kinds of TIFF.

Levels of fewer bits than their type are stretched to its range. For example 12 bits become 16, so that 4095 becomes
65535. So are levels that are stored in 16 bits, if the file says that only the lower ones are used.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.extras import require

Array = npt.NDArray[Any]

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF: either byte order, either size of offsets."""
TIFF_OF_PILLOW = TIFF[:3]
"""Those that Pillow knows: it takes offsets of 8 bytes in big-endian order for damage."""

_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_NETPBM = re.compile(rb"P([2356])" + 3 * (_SPACE + rb"(\d+)") + rb"\s")
_SPACES = (b" ", b"\n", b"\r", b"\t", b"\v", b"\f")
_BLOCK_BYTES = 2**20
_HEADER_BYTES = 65_536  # a header has some 20 bytes, and comments

# Tags of TIFF, and their values.
_BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 258, 259, 262, 274, 277
_DESCRIPTION, _MAXIMA = 270, (281, 341)
_PLANES, _EXTRA_SAMPLES, _FORMAT, _SUBSAMPLING = 284, 338, 339, 530
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_UNSIGNED, _FLOAT = 1, 3
_UNCOMPRESSED, _BY_PLANE = 1, 2
_ASSOCIATED_ALPHA = 1  # colours are multiplied by this channel

_OME_BITS = re.compile(r'SignificantBits="(\d+)"')
PNG = b"\x89PNG\r\n\x1a\n"

# How to turn an image upright, by the orientation in its tags.
_TURNS: dict[int, Any] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def refuse_bomb(pixels: int) -> None:
    """Apply Pillow's limit to formats that other libraries decode."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{pixels} pixels could be a decompression bomb; Pillow's limit is {Image.MAX_IMAGE_PIXELS}")


def read_deep_netpbm(file: BinaryIO) -> npt.NDArray[np.uint16] | None:
    """Levels of a PGM or PPM file with more than 8 bits, ``[H, W, 1 or 3]``; None if it is another file.

    Its maxval becomes 65535.
    """
    file.seek(0)
    header = _NETPBM.match(file.read(_HEADER_BYTES))
    if header is None:
        return None
    kind, width, height, maxval = map(int, header.groups())
    if not 255 < maxval <= 65535:
        return None
    shape = (height, width, 3 if kind in (3, 6) else 1)
    refuse_bomb(height * width)
    number = math.prod(shape)
    file.seek(header.end())
    stretched, found = np.empty(number, np.uint16), 0
    for levels in _text_levels(file) if kind in (2, 3) else _binary_levels(file):
        own = levels[: number - found]
        if len(own) and not 0 <= own.min() <= own.max() <= maxval:
            raise ValueError(f"levels: expected 0 to {maxval}, the maxval of the file, got up to {own.max()}")
        stretched[found : found + len(own)] = np.rint(own * 65535 / maxval)
        found += len(own)
        if found == number:
            return stretched.reshape(shape)
    raise ValueError(f"image file is truncated ({number - found} levels are missing)")


def _binary_levels(file: BinaryIO) -> Iterator[npt.NDArray[np.int64]]:
    """Levels of two bytes, some at a time."""
    while block := file.read(_BLOCK_BYTES):
        yield np.frombuffer(block[: len(block) // 2 * 2], ">u2").astype(np.int64)


def _text_levels(file: BinaryIO) -> Iterator[npt.NDArray[np.int64]]:
    """Levels in text with comments, some at a time."""
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        rest = re.sub(rb"#[^\r\n]*[\r\n]", b" ", rest + block)
        comment = rest.find(b"#")  # its end is not read yet
        end = comment if comment >= 0 else max(map(rest.rfind, _SPACES)) + 1  # the last word may go on
        yield np.array([int(word) for word in rest[:end].split()], np.int64)
        rest = rest[end:]
    yield np.array([int(word) for word in rest.partition(b"#")[0].split()], np.int64)


def bits_of_png(file: BinaryIO) -> int:
    """The bits of 16 that a grey PNG file says are significant (chunk sBIT), 9 to 16."""
    file.seek(0)
    header = file.read(33)  # the signature and the first chunk, IHDR
    bits = 16
    if header.startswith(PNG) and header[24:26] == b"\x10\0":
        while (chunk := file.read(8))[4:] not in (b"IDAT", b"IEND", b""):
            size = int.from_bytes(chunk[:4], "big")
            if chunk[4:] == b"sBIT" and size == 1:
                bits = file.read(1)[0]
                break
            file.seek(size + 4, os.SEEK_CUR)  # a checksum follows
    file.seek(0)
    return bits if 8 < bits < 16 else 16


def stretched_png(levels: Array, bits: int) -> Array:
    """Grey levels uint16 of a PNG of which so many bits are significant.

    The standard of PNG has the writer stretch them to 16 bits. Then the lower bits repeat the upper ones, so in a dark
    image they are 0 or 1. Other writers store levels as they came; these are stretched here.
    """
    return levels if (levels & (2 ** (16 - bits) - 1)).max(initial=0) <= 1 else stretched_to_16(levels, bits)


def stretched_to_16(levels: Array, bits: int) -> Array:
    """Levels uint16 of so many bits, stretched to 16. Levels that are larger prove that they have 16 bits."""
    if bits == 16 or levels.max(initial=0) >= 2**bits:
        return levels
    stretched: Array = np.rint(levels * (65535.0 / (2**bits - 1))).astype(np.uint16)
    return stretched


def bits_of_tiff(value: Callable[[int], Any]) -> int:
    """The bits of 16 that a TIFF says are significant, 9 to 16.

    OME-TIFF says it as SignificantBits. A tag with the largest sample value says it if this is the largest level of so
    many bits, such as 4095. Any other value is a statistic of the image, and no reason to change its levels.

    Args:
        value: gives the value of a tag by its number, or None.
    """
    if found := _OME_BITS.search(str(value(_DESCRIPTION) or "")):
        bits = int(found[1])
        return bits if 8 < bits < 16 else 16
    for tag in _MAXIMA:
        largest = value(tag)
        if isinstance(largest, tuple):
            largest = max(largest, default=0)
        if isinstance(largest, int | float) and largest in [2**bits - 1 for bits in range(9, 16)]:
            return int(largest).bit_length()
    return 16


def pillow_reads(image: Image.Image) -> bool:
    """Whether Pillow decodes an opened TIFF rightly, up to :func:`corrected`.

    It takes signed levels for unsigned ones, planes of 16 bits for planes of 8 bits, the first of several bands for
    grey, compressed big-endian floats for little-endian ones, and raw YCbCr for that of full resolution.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, formats = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (_UNSIGNED,)))
    photometric, raw = tags.get(_PHOTOMETRIC, _MIN_IS_WHITE), tags.get(_COMPRESSION, _UNCOMPRESSED) == _UNCOMPRESSED
    planes = tags.get(_SAMPLES, 1) > 1 and tags.get(_PLANES) == _BY_PLANE
    if planes and (
        photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK) or (raw and (bits != {8} or _ASSOCIATED_ALPHA in _extras(tags)))
    ):
        return False
    if bits == {16} and tags.get(_SAMPLES, 1) > 1 and bits_of_tiff(tags.get) < 16:
        return False
    if photometric == _YCBCR and raw and (planes or tags.get(_SUBSAMPLING, (2, 2)) != (1, 1)):
        return False
    if formats == {_FLOAT}:
        return bits == {32} and photometric == _MIN_IS_BLACK and (raw or tags.prefix == b"II")
    return formats == {_UNSIGNED} and (max(bits) <= 8 or bits == {16} or (bits == {12} and raw))


def corrected(image: Image.Image, tags: Any) -> Image.Image:
    """The grey levels of a TIFF with these tags that Pillow has decoded. Pillow neither stretches 12 bits nor inverts
    16 bits of which the lowest is white."""
    negative = tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE
    bits = 12 if tags.get(_BITS) == (12,) else bits_of_tiff(tags.get)
    if not image.mode.startswith("I;16") or (bits == 16 and not negative):
        return image
    levels = stretched_to_16(np.asarray(image).astype(np.uint16), bits)
    return Image.fromarray(65535 - levels if negative else levels)


def _extras(tags: Any) -> tuple[int, ...]:
    """The meaning of the channels beside the colours."""
    extras = tags.get(_EXTRA_SAMPLES, ())
    return extras if isinstance(extras, tuple) else (extras,)


def open_tiff(file: BinaryIO) -> Any:
    """Open a TIFF with tifffile.

    Raises:
        ImportError: tifffile is missing (extra ``data``).
    """
    file.seek(0)
    return require("tifffile", extra="data", purpose="reading this kind of TIFF").TiffFile(file)


def tiff_sizes(tiff: Any) -> tuple[int, int]:
    """Height and width of a TIFF with one image; bands may be stored by pixel, by band or one per page."""
    series = tiff.series[0]
    sizes = dict(zip(series.axes, series.shape, strict=True))
    bands = [axis for axis in series.axes if axis not in "YX" and sizes[axis] > 1]
    if not {"Y", "X"} <= sizes.keys() or len(bands) > 1:
        raise ValueError(f"axes: expected rows, columns and bands, got {sizes}")
    refuse_bomb(sizes["Y"] * sizes["X"])
    return sizes["Y"], sizes["X"]


def read_tiff_bands(file: BinaryIO, bands: int) -> Array:
    """All bands of a TIFF as they are stored, ``[H, W, bands]``, upright and stretched to the range of their type."""
    with open_tiff(file) as tiff:
        page = tiff.pages[0]
        if page.photometric == _PALETTE:
            raise ValueError("photometric: expected levels of bands, got numbers of colours in a palette")
        height, width = tiff_sizes(tiff)
        if math.prod(tiff.series[0].shape) != height * width * bands:  # known before anything is decoded
            found = math.prod(tiff.series[0].shape) // max(1, height * width)
            raise ValueError(f"pixels: expected [H, W, {bands}], got {[height, width, found]}")
        for part in tiff.series[0].pages:
            if part is not None:
                _refuse_missing_parts(part, file)
        pixels = _rows_first(tiff.series[0].asarray(), tiff.series[0].axes)
        return _upright(_stretched(pixels, page), page)


def read_tiff_colours(file: BinaryIO) -> Array:
    """Colours of the first image of a TIFF that Pillow does not read: uint8 or uint16, grey ``[H, W, 1]`` or RGB
    ``[H, W, 3]``, upright. Grey may also be float32.

    Raises:
        ValueError: it is not grey, RGB, CMYK or a palette of 1 to 16 bits, or tifffile is missing.
    """
    try:
        tiff = open_tiff(file)
    except ImportError as error:
        raise ValueError(str(error)) from error
    with tiff:
        page = tiff.pages[0]
        samples, photometric = page.samplesperpixel, page.photometric
        refuse_bomb(math.prod(page.shape) // 4)  # of four channels
        kind = page.dtype and page.dtype.kind
        colours = {_MIN_IS_WHITE: 1, _MIN_IS_BLACK: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4}.get(photometric, 0)
        if not colours or samples < colours or (colours == 1 and samples > 2):
            raise ValueError(
                "photometric: expected grey (also with one channel of alpha), RGB or CMYK, got"
                f" {getattr(photometric, 'name', photometric)} of {samples} channels"
            )
        if kind not in ("u", "b") and not (page.dtype == np.float32 and photometric == _MIN_IS_BLACK and samples == 1):
            raise ValueError(f"pixels: expected unsigned levels of 1 to 16 bits, got {_kind_of(page)}")
        _refuse_missing_parts(page, file)
        pixels = _rows_first(page.asarray(), page.axes)
        if photometric == _PALETTE:
            return _upright((np.moveaxis(page.colormap, 0, -1) >> 8).astype(np.uint8)[pixels[..., 0]], page)
        pixels = _upright(_stretched(pixels, page), page)
    if kind == "f":
        return pixels
    full = np.iinfo(pixels.dtype).max
    if photometric == _MIN_IS_WHITE:
        pixels[..., 0] = full - pixels[..., 0]
    if _ASSOCIATED_ALPHA in page.extrasamples and colours < 4:
        alpha = pixels[..., colours + page.extrasamples.index(_ASSOCIATED_ALPHA), None].astype(np.int64)
        pixels = np.minimum(pixels.astype(np.int64) * full // np.maximum(alpha, 1), full).astype(pixels.dtype)
    if photometric == _CMYK:
        levels = pixels[..., :4] if full == 255 else (pixels[..., :4] >> 8).astype(np.uint8)
        return np.asarray(Image.fromarray(np.ascontiguousarray(levels), "CMYK").convert("RGB"))
    return pixels[..., :colours]


def tiff_bytes(file: BinaryIO) -> int:
    """About the bytes of memory that :func:`read_tiff_colours` takes; 0 if it will refuse the file."""
    try:
        with open_tiff(file) as tiff:
            page = tiff.pages[0]
            is_plain = page.bitspersample in (8, 16) and _ASSOCIATED_ALPHA not in page.extrasamples
            # Plain levels are copied twice. Others are computed in 8 bytes, with two intermediate results.
            size: int = math.prod(page.shape) * (3 * page.bitspersample // 8 if is_plain else 28)
            return size
    except ImportError:
        return 0


def _refuse_missing_parts(page: Any, file: BinaryIO) -> None:
    """Refuse a truncated image: tifffile reads its missing strips or tiles as black. A part of no bytes is one that the
    writer left out because it is empty."""
    size = file.seek(0, os.SEEK_END)
    places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    missing = math.prod(page.chunked) - sum(0 <= start <= start + count <= size for start, count in places)
    if missing > 0:
        raise ValueError(f"image file is truncated ({missing} of its strips or tiles are missing)")


def _rows_first(pixels: Array, axes: str) -> Array:
    """An array of tifffile as ``[H, W, bands]``."""
    pixels = np.moveaxis(pixels, [axes.index("Y"), axes.index("X")], [0, 1])
    return pixels.reshape(*pixels.shape[:2], -1)


def _upright(pixels: Array, page: Any) -> Array:
    tag = page.tags.get(_ORIENTATION)
    turn = _TURNS.get(int(tag.value)) if tag is not None else None
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _stretched(pixels: Array, page: Any) -> Array:
    """Unsigned levels of 1 to 16 bits, stretched to 8 or 16; other types stay as they are."""
    bits = page.bitspersample
    if pixels.dtype.kind not in "ub":
        return pixels
    if not isinstance(bits, int) or bits > 16:
        raise ValueError(f"pixels: expected levels of 1 to 16 bits, got {_kind_of(page)}")
    full, dtype = (255, np.uint8) if bits <= 8 else (65535, np.uint16)
    if bits == 8:
        return pixels.astype(dtype)
    if bits == 16:
        tags = page.tags
        return stretched_to_16(pixels.astype(dtype), bits_of_tiff(lambda tag: tags[tag].value if tag in tags else None))
    if pixels.size and pixels.max() >= 2**bits:
        raise ValueError(f"levels: expected {bits} bits, as the file says, got {pixels.max()}")
    levels: Array = np.rint(pixels * float(full) / (2**bits - 1))
    return levels.astype(dtype)


def _kind_of(page: Any) -> str:
    kinds = {1: "unsigned", 2: "signed", 3: "float"}
    return f"{kinds.get(page.sampleformat, page.sampleformat)} of {page.bitspersample} bits"
