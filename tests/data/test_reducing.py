"""Decoding at a reduced size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
from PIL import ExifTags, Image

from dinov2.data import UnreadableImageError, decode_image, decode_reduced, reducing
from tests.data.files import encode_array, noise

PHOTOGRAPH = Image.fromarray(skimage.data.astronaut()[:360])  # 512 x 360
DEEP = Image.fromarray(np.asarray(PHOTOGRAPH.convert("L")).astype(np.uint16) * 257)
FILES = [
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")),
    *(("TIFF", mode) for mode in ("RGB", "CMYK", "I;16")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *((kind, "RGB") for kind in ("BMP", "PPM", "GIF", "JPEG2000")),
    ("PPM", "I;16"),
]


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def content_of(kind: str, mode: str) -> bytes:
    return encode(DEEP if mode == "I;16" else PHOTOGRAPH.convert(mode), kind)


def averaged(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.HAMMING)).astype(float)


@pytest.mark.parametrize(("kind", "mode"), FILES)
def test_every_format_is_reduced_by_the_same_rules(kind: str, mode: str) -> None:
    content = content_of(kind, mode)
    whole = decode_image(content, "x")
    same = decode_reduced(content, "x", 512)
    np.testing.assert_array_equal(same.pixels, whole)
    assert same.pixels.dtype == np.uint8
    for side in (300, 100, 40):
        small = decode_reduced(content, "x", side)
        height = round(360 * side / 512)
        assert small.pixels.shape == (height, side, 3)
        assert (small.width, small.height) == (512, 360)
        assert np.abs(small.pixels - averaged(whole, side, height)).mean() < 5, side


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_image_is_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    content = encode(PHOTOGRAPH, kind, exif=exif)
    whole = decode_image(content, "x")
    small = decode_reduced(content, "x", 64)
    assert (small.height, small.width) == whole.shape[:2]
    height, width = (round(side / 8) for side in whole.shape[:2])
    assert np.abs(small.pixels - averaged(whole, width, height)).mean() < 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    array = (noise(0, 50, 70).astype(dtype) << (8 if dtype is np.uint16 else 0)).astype(dtype)
    for stored in (array, np.asfortranarray(array), array.astype(np.dtype(dtype).newbyteorder(">"))):
        np.testing.assert_array_equal(decode_reduced(encode_array(stored), "x", 70).pixels, noise(0, 50, 70))
        assert decode_reduced(encode_array(stored), "x", 10).pixels.shape == (7, 10, 3)


@pytest.mark.parametrize(
    "array", [np.zeros((5, 5), np.uint8), np.zeros((5, 5, 4), np.uint8), np.zeros((5, 5, 3), np.float32)]
)
def test_arrays_that_are_refused_have_the_same_reason(array: np.ndarray) -> None:
    reasons = []
    for decode in (lambda content: decode_image(content, "x"), lambda content: decode_reduced(content, "x", 3)):
        with pytest.raises(UnreadableImageError) as error:
            decode(encode_array(array))
        reasons.append(str(error.value).replace("[5, 5, 1]", "[5, 5]"))
    assert reasons[0].replace("[5, 5]", "") == reasons[1].replace("[5, 5]", "")


@pytest.mark.parametrize(("kind", "mode"), FILES)
def test_a_cut_file_is_unreadable(kind: str, mode: str) -> None:
    content = content_of(kind, mode)
    content = content[: len(content) // 2]
    with pytest.raises(UnreadableImageError, match="cannot read image x"):
        decode_image(content, "x")
    with pytest.raises(UnreadableImageError, match="cannot read image x"):
        decode_reduced(content, "x", 40)


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_parts_do_not_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(PHOTOGRAPH, kind)
    whole = decode_reduced(content, "x", 100).pixels
    monkeypatch.setattr(reducing, "PART_PIXELS", 512 * 30)
    np.testing.assert_array_equal(decode_reduced(content, "x", 100).pixels, whole)


def test_the_shorter_side_can_have_a_least_size() -> None:
    content = encode(PHOTOGRAPH.resize((600, 60)), "PNG")
    assert decode_reduced(content, "x", 100).pixels.shape == (10, 100, 3)
    assert decode_reduced(content, "x", 100, 30).pixels.shape == (30, 300, 3)
    assert decode_reduced(content, "x", 100, 90).pixels.shape == (60, 600, 3)
    assert decode_reduced(encode(Image.new("RGB", (3000, 1)), "PNG"), "x", 10).pixels.shape == (1, 10, 3)


def test_jpeg_2000_is_read_at_a_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    for levels, halved in ((5, 2), (1, 1)):
        content = encode(PHOTOGRAPH, "JPEG2000", num_resolutions=levels + 1)
        image = Image.open(io.BytesIO(content))
        reducing.read_smaller(image, (60, 42), content)
        assert image.load() is not None
        assert image.size == (512 >> halved, 360 >> halved)


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {}), ("PNG", {}), ("JPEG", {"progressive": True})])
def test_an_image_that_takes_too_much_memory_is_refused(
    kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(PHOTOGRAPH, kind, **options)
    monkeypatch.setattr(reducing, "DECODING_BYTES", len(content) + 512 * 360)
    with pytest.raises(UnreadableImageError, match=r"decoding it takes about \d MB of memory; at most 0 are allowed"):
        decode_reduced(content, "x", 64)
    assert decode_reduced(encode(PHOTOGRAPH, "JPEG"), "x", 64).pixels.shape == (45, 64, 3)  # read at an eighth


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_turning_an_image_takes_memory_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = encode(PHOTOGRAPH, kind, exif=exif)
    monkeypatch.setattr(reducing, "DECODING_BYTES", len(turned) + 7 * 512 * 360)
    assert decode_reduced(encode(PHOTOGRAPH, kind), "x", 64).pixels.shape == (45, 64, 3)
    with pytest.raises(UnreadableImageError, match="decoding it takes about"):
        decode_reduced(turned, "x", 64)
