"""Levels of 9 to 15 bits that are stored in 16: stretched if the file says so, and measured in any case."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.curate.screen import quality
from dinov2.data import decode_image, decode_reduced, read_image
from dinov2.data.remarks import ImageRemarkWarning
from tests.data.files import encode, encode_array

OME = '<OME><Image><Pixels SignificantBits="{}"/></Image></OME>'


def levels(bits: int, *shape: int, most: int | None = None) -> np.ndarray:
    """Levels of so many bits, up to the largest."""
    most = 2**bits - 1 if most is None else most
    found = np.random.default_rng(bits).integers(0, most + 1, shape or (24, 32)).astype(np.uint16)
    found.flat[0] = most
    return found


def tiff(array: np.ndarray, *tags: tuple, **options: object) -> bytes:
    file = io.BytesIO()
    extra = [(number, kind, np.size(value), value, True) for number, kind, value in tags]
    tifffile.imwrite(file, array, extratags=extra, metadata=None, **options)
    return file.getvalue()


def png(array: np.ndarray, bits: int | None = None) -> bytes:
    """A PNG, which may say how many bits are significant."""
    content = encode(array)
    if bits is None:
        return content
    chunk = b"sBIT" + bytes([bits])
    return content[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def stretched(array: np.ndarray, bits: int) -> np.ndarray:
    return np.rint(array * (65535 / (2**bits - 1))).astype(np.uint16)


def check(content: bytes, expected: np.ndarray) -> None:
    """The file has the expected levels uint16 as one channel, or of RGB its upper 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImageRemarkWarning)
        colours = decode_image(content, "it")
        if expected.ndim == 2:
            np.testing.assert_array_equal(decode_image(content, "it", 1)[..., 0], expected)
    grey = expected[..., None] if expected.ndim == 2 else expected
    np.testing.assert_array_equal(colours, np.broadcast_to(grey >> 8, colours.shape))


@pytest.mark.parametrize("bits", range(9, 16))
def test_a_tiff_that_says_its_bits(bits: int) -> None:
    array, most = levels(bits), 2**bits - 1
    for content in (
        tiff(array, (281, "H", most)),
        tiff(array, (341, "H", most)),
        tiff(array, (341, "d", float(most))),
        tiff(array, description=OME.format(bits)),
        tiff(array, (281, "H", most), byteorder=">"),
        tiff(array, (281, "H", most), compression="zlib", predictor=True),
    ):
        check(content, stretched(array, bits))
    white = tiff(array, (281, "H", most), photometric="miniswhite")
    check(white, 65535 - stretched(array, bits))


def test_a_tiff_in_colour_that_says_its_bits() -> None:
    array = levels(12, 24, 32, 3)
    check(tiff(array, (281, "H", (4095, 4095, 4095)), photometric="rgb"), stretched(array, 12))
    check(tiff(array, photometric="rgb", description=OME.format(12)), stretched(array, 12))
    bands = levels(12, 24, 32, 5)
    content = tiff(bands, (281, "H", (4095,) * 5), photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(decode_image(content, "it", 5), stretched(bands, 12))


def test_ome_tiff_of_its_own_writer(tmp_path: Path) -> None:
    array, path = levels(12), tmp_path / "a.ome.tif"
    tifffile.imwrite(path, array, metadata={"axes": "YX", "SignificantBits": 12}, ome=True)
    check(path.read_bytes(), stretched(array, 12))


def test_what_says_no_bits() -> None:
    """Levels stay: dark images must not become bright."""
    dark, full = levels(12, most=3000), levels(16)
    check(tiff(dark), dark)
    check(tiff(dark, (281, "H", 3000)), dark)  # a statistic
    check(tiff(dark, description="ImageJ=1.54\nmin=0.0\nmax=4095.0"), dark)  # what a viewer showed
    check(tiff(dark, description=OME.format(16)), dark)
    check(tiff(full, (281, "H", 4095)), full)  # the file is wrong about itself
    check(tiff(full, description=OME.format(12)), full)
    check(png(dark), dark)


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_a_png_that_says_its_bits(bits: int) -> None:
    array = levels(bits)
    check(png(array, bits), stretched(array, bits))  # as some cameras write it
    check(png(stretched(array, bits), bits), stretched(array, bits))  # as the standard wants it
    check(png(array << (16 - bits), bits), array << (16 - bits))
    dark = levels(2 * bits - 16)  # bright enough to be seen only if it were stretched twice
    check(png(stretched(dark, bits), bits), stretched(dark, bits))
    check(png(dark << (16 - bits), bits), dark << (16 - bits))
    check(png(levels(16), bits), levels(16))


@pytest.mark.parametrize("bits", [0, 8, 16, 200])
def test_other_bits_of_a_png_change_nothing(bits: int) -> None:
    check(png(levels(12), bits), levels(12))
    colours = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(png(colours, bits), "it"), colours)


def texture(bits: int, *, colour: bool = False) -> np.ndarray:
    """A picture in levels of so many bits."""
    y, x = np.mgrid[:96, :128]
    picture = (np.sin(x / 9) + np.cos(y / 7 + x / 30) + 2) / 4
    found = np.rint(picture * (2**bits - 1)).astype(np.uint16)
    return np.repeat(found[..., None], 3, axis=2) if colour else found


@pytest.mark.parametrize(
    "kind", ["tiff", "tiff in colour", "big-endian tiff", "png", "png in colour", "pgm", "npy", "jp2"]
)
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_few_bits_are_measured_as_their_picture(bits: int, kind: str) -> None:
    """12 bits in 16 counted as plain."""
    array = texture(bits, colour="colour" in kind or kind == "npy")
    pgm = b"P5 128 96 65535\n" + array.astype(">u2").tobytes()
    content = {
        "tiff": lambda: tiff(array),
        "tiff in colour": lambda: tiff(array, photometric="rgb"),
        "big-endian tiff": lambda: tiff(array, byteorder=">"),
        "png": lambda: png(array),
        "png in colour": lambda: cv2.imencode(".png", array)[1].tobytes(),
        "pgm": lambda: pgm,
        "npy": lambda: encode_array(array),
        "jp2": lambda: encode(array, "JPEG2000"),
    }[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = decode_reduced(content, "it", 10_000).pixels
    picture = texture(bits, colour=True) >> (bits - 8)
    np.testing.assert_array_equal(seen, picture)
    assert quality(seen).entropy > 6.5


@pytest.mark.parametrize("noise", [1, 15, 30])
def test_a_black_image_of_16_bits_stays_plain(noise: int) -> None:
    array = np.random.default_rng(0).integers(0, noise + 1, (96, 128)).astype(np.uint16)
    for content in (tiff(array), png(array)):
        assert quality(decode_reduced(content, "it", 10_000).pixels).entropy < 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "PPM", "JPEG2000", "NPY"])
def test_all_other_images_are_measured_as_they_are_trained_on(kind: str) -> None:
    colours = np.random.default_rng(0).integers(0, 40, (24, 32, 3)).astype(np.uint8)
    content = encode_array(colours) if kind == "NPY" else encode(colours, kind)
    np.testing.assert_array_equal(decode_reduced(content, "it", 10_000).pixels, decode_image(content, "it"))
    full = levels(16, 24, 32, 3)
    in_colour = cv2.imencode(".png", full)[1].tobytes()
    for content in (
        tiff(full, photometric="rgb"),
        tiff(full[..., 0]),
        png(full[..., 0]),
        encode_array(full),
        in_colour,
    ):
        np.testing.assert_array_equal(decode_reduced(content, "it", 10_000).pixels, decode_image(content, "it"))


def test_training_is_told_of_images_that_become_black(tmp_path: Path) -> None:
    for name, content in {
        "1.tif": tiff(levels(12)),
        "2.tif": tiff(levels(12, 24, 32, 3), photometric="rgb"),
        "3.png": png(levels(12)),
        "4.png": cv2.imencode(".png", levels(12, 24, 32, 3))[1].tobytes(),
        "5.npy": encode_array(levels(12, 24, 32, 3)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.warns(ImageRemarkWarning, match="no level above 4095 of 65535, so it becomes almost black"):
            read_image(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (
            tiff(levels(13)),
            tiff(levels(12), description=OME.format(12)),
            encode(np.zeros((9, 9), np.uint8)),
        ):
            decode_image(content, "it")
        decode_image(tiff(levels(12)), "it", 1)


def test_pillow_decodes_what_is_not_16_bits_alone() -> None:
    """The checks above read nothing twice: an image of 8 bits is opened once."""
    content = encode(np.zeros((4, 4, 3), np.uint8))
    opened = []
    original = Image.open

    def counting(*arguments: object, **options: object) -> Image.Image:
        opened.append(arguments)
        return original(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", counting)
        decode_reduced(content, "it", 10_000)
    assert len(opened) == 1
