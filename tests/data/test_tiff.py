"""Every layout of TIFF has the right levels or one clear error, against the arrays that tifffile writes and reads.

The rule is that of ``test_layouts.py``.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
from itertools import product

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data import UnreadableImageError, decode_image
from tests.data.test_layouts import HEIGHT, WIDTH, as_rgb, check, levels, stretched


def tiff(image: np.ndarray, **options: object) -> bytes:
    """What tifffile writes; its own reading is the same array."""
    file = io.BytesIO()
    tifffile.imwrite(file, image, metadata=None, **options)
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(file.getvalue())), image)
    return file.getvalue()


LAYOUTS = [
    {"byteorder": order, "compression": compression, "tile": tile, "bigtiff": big, "predictor": predictor}
    for order, (compression, predictor), tile, big in product(
        "<>", ((None, None), ("zlib", None), ("zlib", 2)), (None, (16, 16)), (False, True)
    )
]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_tiff(photometric: str, bits: int) -> None:
    image, full = levels(1, bits), 2**bits - 1
    light = image if photometric == "minisblack" else full - image
    for layout in LAYOUTS:
        content = tiff(image[..., 0].astype(f"u{bits // 8}"), photometric=photometric, **layout)
        check(content, as_rgb(light, full), 3)
        check(content, stretched(light, full), 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("extra", [None, "unassalpha", "unspecified"])
def test_rgb_tiff(planes: str, bits: int, extra: str | None) -> None:
    image, full = levels(4 if extra else 3, bits), 2**bits - 1
    stored = image.astype(f"u{bits // 8}")
    options = {"photometric": "rgb", "planarconfig": planes, "extrasamples": [extra] if extra else None}
    for layout in LAYOUTS:
        if layout["predictor"] and planes == "separate" and layout["tile"]:
            continue  # tifffile does not write it without imagecodecs
        content = tiff(stored.transpose(2, 0, 1) if planes == "separate" else stored, **options, **layout)
        check(content, as_rgb(image, full), 3)
        luma = np.asarray(Image.fromarray(as_rgb(image, full)).convert("L"))[..., None]
        check(content, luma, 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 4])
def test_colours_that_are_multiplied_by_their_opacity(channels: int, planes: str, bits: int) -> None:
    full = 2**bits - 1
    colours, alpha = levels(channels - 1, bits), levels(1, bits, seed=1) // 2 + full // 2
    stored = np.concatenate([colours * alpha // full, alpha], axis=2).astype(f"u{bits // 8}")
    options = {"photometric": "rgb" if channels == 4 else "minisblack", "extrasamples": ["assocalpha"]}
    for compression in (None, "zlib"):
        content = tiff(
            stored.transpose(2, 0, 1) if planes == "separate" else stored,
            planarconfig=planes,
            compression=compression,
            **options,
        )
        check(content, as_rgb(colours, full), 3, tolerance=3)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_cmyk_tiff(planes: str, bits: int) -> None:
    image, full = levels(4, bits), 2**bits - 1
    stored = image.astype(f"u{bits // 8}")
    ink = np.stack([as_rgb(image[..., [i]], full)[..., 0] for i in range(4)], axis=2)
    expected = np.asarray(Image.fromarray(ink, "CMYK").convert("RGB"))
    for compression in (None, "zlib"):
        content = tiff(
            stored.transpose(2, 0, 1) if planes == "separate" else stored,
            photometric="separated",
            planarconfig=planes,
            compression=compression,
        )
        check(content, expected, 3)


def test_float_tiff() -> None:
    image = np.random.default_rng(0).random((HEIGHT, WIDTH, 1)).astype(np.float32)
    for layout in LAYOUTS:
        if layout["predictor"]:
            continue  # of integers
        content = tiff(image[..., 0], photometric="minisblack", **layout)
        np.testing.assert_array_equal(decode_image(content, "a", 1), image)
        with pytest.raises(UnreadableImageError, match="32 bits per channel"):
            decode_image(content, "a", 3)


def test_palettes_and_bits_of_tiff() -> None:
    black = levels(1, 1)
    for photometric, light in (("minisblack", black), ("miniswhite", 1 - black)):
        content = tiff(black[..., 0].astype(bool), photometric=photometric)
        check(content, as_rgb(light, 1), 3)
        check(content, stretched(light, 1), 1)
    index, palette = levels(1, 8), np.random.default_rng(0).integers(0, 256, (3, 256))
    options = {"photometric": "palette", "colormap": (palette * 257).astype(np.uint16)}
    for layout in LAYOUTS:
        content = tiff(index[..., 0].astype(np.uint8), **options, **layout)
        check(content, palette.T[index[..., 0]].astype(np.uint8), 3)
    with pytest.raises(UnreadableImageError, match="expected levels of bands, got numbers of colours in a palette"):
        decode_image(content, "a", 2)


def by_hand(image: np.ndarray, bits: int, photometric: int, order: str) -> bytes:
    """A grey TIFF of packed levels, which tifffile writes only with imagecodecs. Packed bits have one order."""
    unpacked = (image[..., 0, None] >> np.arange(bits - 1, -1, -1)) & 1
    raster = b"".join(np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in unpacked)
    return with_tags({258: bits, 262: photometric, 277: 1}, raster, order)


def with_tags(fields: dict[int, int], raster: bytes, order: str) -> bytes:
    """A TIFF of one strip; each of its tags has one value."""
    size = {256: WIDTH, 257: HEIGHT, 259: 1, 273: 8, 278: HEIGHT, 279: len(raster)}
    entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted((fields | size).items())]
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(raster))
    return mark + raster + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)


def test_ycbcr_tiff() -> None:
    """Rightly if it has full resolution. Smaller planes of colour are known to Pillow only in compressed files."""
    image = np.full((HEIGHT, WIDTH, 3), (200, 30, 90), np.uint8)
    stored = np.asarray(Image.fromarray(image).convert("YCbCr"))
    for compression in (None, "zlib"):
        check(tiff(stored, photometric="ycbcr", compression=compression), image, 3, tolerance=3)
    half = with_tags({258: 8, 262: 6, 277: 3, 530: 2}, bytes(2 * HEIGHT * WIDTH), "<")
    planes = tiff(stored.transpose(2, 0, 1), photometric="ycbcr", planarconfig="separate")
    for content in (half, planes):
        with pytest.raises(UnreadableImageError, match=r"expected grey .*, RGB or CMYK, got YCBCR of 3 channels"):
            decode_image(content, "a")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12])
def test_packed_levels(bits: int, order: str) -> None:
    image, full = levels(1, bits), 2**bits - 1
    for photometric, light in ((0, full - image), (1, image)):
        if bits == 12 and (photometric == 0 or order == ">"):
            continue  # below: only imagecodecs unpacks them
        content = by_hand(image, bits, photometric, order)
        check(content, as_rgb(light, full), 3)
        check(content, stretched(light, full), 1)


@pytest.mark.parametrize("bits", [6, 10, 12, 14])
def test_packed_levels_are_right_or_refused(bits: int) -> None:
    image, full = levels(1, bits), 2**bits - 1
    for order, photometric in product("<>", (0, 1)):
        content = by_hand(image, bits, photometric, order)
        if (bits == 12 and photometric == 1 and order == "<") or importlib.util.find_spec("imagecodecs"):
            check(content, stretched(image if photometric else full - image, full), 1)
        else:
            with pytest.raises(UnreadableImageError, match="imagecodecs"):
                decode_image(content, "a", 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        ("i1", {}, "expected unsigned levels of 1 to 16 bits, got signed of 8 bits"),
        ("i2", {}, "got signed of 16 bits"),
        ("u4", {}, "expected levels of 1 to 16 bits, got unsigned of 32 bits"),
        ("i4", {}, "got signed of 32 bits"),
        ("u8", {}, "got unsigned of 64 bits"),
        ("f2", {}, "got float of 16 bits"),
        ("f8", {}, "got float of 64 bits"),
        ("f4", {"photometric": "miniswhite"}, "got float of 32 bits"),
        ("i1", {"photometric": "rgb"}, "got signed of 8 bits"),
        ("f4", {"photometric": "rgb"}, "got float of 32 bits"),
        ("u1", {"bands": 3}, "expected grey .*, RGB or CMYK, got MINISBLACK of 3 channels"),
        ("u2", {"bands": 5}, "got MINISBLACK of 5 channels"),
    ],
)
def test_tiff_that_is_refused(dtype: str, options: dict[str, object], reason: str, channels: int) -> None:
    options = {"photometric": "minisblack"} | options
    bands = options.pop("bands", 3 if options["photometric"] == "rgb" else 1)
    image = np.ones((HEIGHT, WIDTH, bands), dtype)
    for planes, compression, order in product(("contig", "separate"), (None, "zlib"), "<>"):
        if bands > 1:
            options["planarconfig"] = planes
        stored = image[..., 0] if bands == 1 else image.transpose(2, 0, 1) if planes == "separate" else image
        content = tiff(stored, compression=compression, byteorder=order, **options)
        with pytest.raises(UnreadableImageError, match=f"cannot read image a: .*{reason}"):
            decode_image(content, "a", channels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_upright(orientation: int) -> None:
    """However it is read: by Pillow, from planes, or as bands."""
    image = levels(5, 16)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](image)
    options = {"extratags": [(274, "H", 1, orientation, True)]}
    stored = image.astype(np.uint16)
    check(tiff(stored[..., :3], photometric="rgb", **options), as_rgb(turned, 65535), 3)
    planes = stored[..., :3].transpose(2, 0, 1)
    check(tiff(planes, photometric="rgb", planarconfig="separate", **options), as_rgb(turned, 65535), 3)
    check(tiff(stored, photometric="minisblack", planarconfig="contig", **options), turned.astype(np.uint16), 5)


def test_the_first_page_counts() -> None:
    pages = [levels(3, 16, seed).astype(np.uint16).transpose(2, 0, 1) for seed in range(2)]
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="rgb", planarconfig="separate", metadata=None)
    check(file.getvalue(), as_rgb(levels(3, 16), 65535), 3)


def test_without_tifffile_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = tiff(levels(3, 16).astype(np.uint16).transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UnreadableImageError, match=r"cannot read image a: .*'tifffile'.*dinov2-kernels\[data\]"):
        decode_image(content, "a")


def test_cut_tiff_is_refused() -> None:
    for compression, planes in product((None, "zlib"), ("contig", "separate")):
        image = levels(3, 16).astype(np.uint16)
        stored = image.transpose(2, 0, 1) if planes == "separate" else image
        content = tiff(stored, photometric="rgb", planarconfig=planes, compression=compression)
        for channels in (1, 3, 5):
            with pytest.raises(UnreadableImageError, match="cannot read image a: "):
                decode_image(content[: len(content) // 2], "a", channels)


@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_missing_strips_are_refused(planes: str) -> None:
    """They are not black, whether the file is cut off between them or claims more rows than it has."""
    image = levels(3, 16).astype(np.uint16)
    stored = image.transpose(2, 0, 1) if planes == "separate" else image
    content = tiff(stored, photometric="rgb", planarconfig=planes, rowsperstrip=4, bigtiff=True, byteorder=">")
    with tifffile.TiffFile(io.BytesIO(content)) as opened:
        place, rows = opened.pages[0].dataoffsets[-1], opened.pages[0].tags[257].valueoffset
    for damaged in (content[:place], content[: place + 100], content[:rows] + b"\0\1" + content[rows + 2 :]):
        for channels in (1, 3):
            with pytest.raises(UnreadableImageError, match=r"truncated \(\d+ of its strips or tiles are missing\)"):
                decode_image(damaged, "a", channels)
    bands = tiff(levels(5, 16).astype(np.uint16), photometric="minisblack", planarconfig="contig", rowsperstrip=4)
    with tifffile.TiffFile(io.BytesIO(bands)) as opened:
        place = opened.pages[0].dataoffsets[-1]
    with pytest.raises(UnreadableImageError, match=r"truncated \(1 of its strips or tiles are missing\)"):
        decode_image(bands[: place + 8], "a", 5)
