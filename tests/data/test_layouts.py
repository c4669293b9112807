"""Every layout of pixels has the right levels or one clear error: Netpbm, PNG, BMP, against the arrays in them.

The rule: for three channels, b > 8 bits are reduced to their upper 8, and b < 8 bits are stretched to 0..255. For one
channel, levels of b bits are stretched to 8 or 16 bits.
"""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dinov2.data import UnreadableImageError, decode_image, layouts
from dinov2.data.decoding import read_header

HEIGHT, WIDTH = 24, 40


def levels(channels: int, bits: int, seed: int = 0) -> np.ndarray:
    """Random levels of all bits, int64 [H, W, C]."""
    return np.random.default_rng(seed).integers(0, 2**bits, (HEIGHT, WIDTH, channels))


def stretched(image: np.ndarray, full: int) -> np.ndarray:
    """Levels up to ``full`` as uint8 or uint16."""
    target = 255 if full <= 255 else 65535
    return np.rint(image * target / full).astype(np.uint8 if full <= 255 else np.uint16)


def as_rgb(image: np.ndarray, full: int) -> np.ndarray:
    """What is read for three channels, of levels up to ``full`` [H, W, 1 or more]."""
    image = stretched(image, full)
    image = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def check(content: bytes, expected: np.ndarray, channels: int, tolerance: int = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_image(content, "a", channels)
        header = read_header(content, "a")
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance
    assert {header.height, header.width} == set(found.shape[:2])


# --- Netpbm


def netpbm(kind: int, image: np.ndarray, maxval: int) -> bytes:
    height, width, _ = image.shape
    header = f"P{kind} # a comment\n{width}\n# 7 8 another\n {height} {maxval}\n".encode()
    if kind in (2, 3):
        rows = [" ".join(map(str, row)) for row in image.reshape(height, -1).tolist()]
        return header + "\n".join(rows).replace("\n", " # of a row\n").encode()
    return header + image.astype(">u2" if maxval > 255 else np.uint8).tobytes()


@pytest.mark.parametrize("maxval", [1, 15, 200, 255, 256, 1000, 4095, 65534, 65535])
@pytest.mark.parametrize("kind", [2, 3, 5, 6])
def test_netpbm(kind: int, maxval: int) -> None:
    image = np.random.default_rng(maxval).integers(0, maxval + 1, (HEIGHT, WIDTH, 3 if kind in (3, 6) else 1))
    content = netpbm(kind, image, maxval)
    check(content, as_rgb(image, maxval), 3)
    if kind in (2, 5):
        check(content, stretched(image, maxval), 1)
    else:
        check(content, np.asarray(Image.fromarray(as_rgb(image, maxval)).convert("L"))[..., None], 1)


@pytest.mark.parametrize("kind", [2, 3, 5, 6])
def test_netpbm_is_read_in_blocks(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 1001, (HEIGHT, WIDTH, 3 if kind in (3, 6) else 1))
    monkeypatch.setattr(layouts, "_BLOCK_BYTES", 6)
    check(netpbm(kind, image, 1000), as_rgb(image, 1000), 3)


@pytest.mark.parametrize("kind", [1, 4])
def test_bitmaps(kind: int) -> None:
    black = levels(1, 1)
    rows = [" ".join(map(str, row)) for row in black[..., 0].tolist()]
    raster = "\n".join(rows).encode() if kind == 1 else np.packbits(black[..., 0], axis=1).tobytes()
    check(f"P{kind}\n{WIDTH} {HEIGHT}\n".encode() + raster, as_rgb(1 - black, 1), 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (netpbm(5, levels(1, 16), 65535)[:-3], r"truncated \(2 levels are missing\)"),
        (netpbm(2, levels(1, 16), 65535)[:-40], r"truncated \(\d+ levels are missing\)"),
        (netpbm(6, levels(3, 10), 1000), r"levels: expected 0 to 1000, the maxval of the file, got up to 1023"),
        (b"P2 2 1 1000 5 x", "invalid literal"),
        (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\0", "expected one of .*PPM"),
    ],
)
def test_netpbm_that_is_refused(content: bytes, reason: str) -> None:
    for channels in (1, 3):
        with pytest.raises(UnreadableImageError, match=f"cannot read image a: .*{reason}"):
            decode_image(content, "a", channels)


# --- PNG


def png(
    image: np.ndarray, bits: int, colours: int, interlaced: bool, palette: bytes = b"", alpha: bytes = b""
) -> bytes:
    """A PNG of levels [H, W, C]; ``colours`` is its colour type."""

    def packed(part: np.ndarray) -> bytes:
        rows = part.reshape(len(part), -1)
        if bits == 16:
            return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
        unpacked = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        return b"".join(b"\0" + np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in unpacked)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [image[y::down, x::right] for x, y, right, down in passes] if interlaced else [image]
    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    chunks = [(b"PLTE", palette), (b"tRNS", alpha), (b"IDAT", zlib.compress(b"".join(map(packed, parts))))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, content)
        for name, content in [(b"IHDR", header), *chunks, (b"IEND", b"")]
        if content or name == b"IEND"
    )


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_png(bits: int, interlaced: bool, transparent: bool) -> None:
    grey, full = levels(1, bits), 2**bits - 1
    key = struct.pack(">H", int(grey[0, 0, 0])) if transparent else b""
    check(png(grey, bits, 0, interlaced, alpha=key), as_rgb(grey, full), 3)
    check(png(grey, bits, 0, interlaced, alpha=key), stretched(grey, full), 1)
    if bits <= 8:
        palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3)).astype(np.uint8)
        content = png(grey, bits, 3, interlaced, palette.tobytes(), bytes(range(2**bits)) if transparent else b"")
        colours = palette[grey[..., 0]]
        check(content, colours, 3)
        check(content, np.asarray(Image.fromarray(colours).convert("L"))[..., None], 1)
    if bits >= 8 and not transparent:
        for kind, channels in ((2, 3), (4, 2), (6, 4)):
            image = levels(channels, bits)
            check(png(image, bits, kind, interlaced), as_rgb(image, full), 3)


# --- others


def test_bmp_of_16_and_32_bits() -> None:
    image = levels(3, 5)
    rows = (image[..., 0] << 10 | image[..., 1] << 5 | image[..., 2])[::-1].astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 0, len(rows), 0, 0, 0, 0)
    check(b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows, as_rgb(image, 31), 3, tolerance=1)
    colours = levels(4, 8)
    rows = colours[::-1, :, [2, 1, 0, 3]].astype(np.uint8).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 32, 0, len(rows), 0, 0, 0, 0)
    check(b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows, as_rgb(colours, 255), 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 4 +X 4\n", "expected one of AVIF, BMP, GIF, JPEG"),
        (b"8BPS\0\1" + bytes(40), "expected one of .* or NPY$"),
        (
            b"\xff\xd8\xff\xc0\0\x11\x0c\0\x10\0\x10\3\1\x22\0\2\x11\1\3\x11\1\xff\xd9",
            "JPEG: cannot handle 12-bit layers",
        ),
        (
            b"\x93NUMPY\1\0v\0" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (0, 5), }".ljust(117) + b"\n",
            "pixel",
        ),
    ],
)
def test_other_files_say_what_was_expected(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=f"cannot read image a: .*{reason}"):
        decode_image(content, "a")
    with pytest.raises(UnreadableImageError, match=f"cannot read image a: .*{reason}"):
        read_header(content, "a")
