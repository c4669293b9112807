"""What Pillow, tifffile and libtiff say about an image comes with its name, whoever decodes it."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data import UnreadableImageError, remarks
from dinov2.data.decoding import decode_image, read_header, read_image
from dinov2.data.remarks import ImageRemarkWarning, kept_remarks, overheard

NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0broken"


def file_of(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], kind: str, **options: object) -> bytearray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)  # type: ignore[arg-type]
    return bytearray(file.getvalue())


def damaged_lzw() -> bytes:
    """libtiff says why, Pillow only that."""
    content = file_of(NOISE, "TIFF", compression="tiff_lzw")
    content[-400:-350] = bytes(50)
    return bytes(content)


def damaged_fax() -> bytes:
    """libtiff complains about lines, and the image is decoded nevertheless."""
    content = file_of(NOISE[..., 0] // 128 * 255, "TIFF")
    bits = Image.open(io.BytesIO(content)).convert("1", dither=Image.Dither.NONE)
    file = io.BytesIO()
    bits.save(file, "TIFF", compression="group4")
    fax = bytearray(file.getvalue())
    fax[300:400] = b"\xff" * 100
    return bytes(fax)


def bad_tag() -> bytes:
    """tifffile logs that a tag lies outside of the file."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((32, 32, 5), np.uint16), photometric="minisblack", planarconfig="contig")
    content = bytearray(file.getvalue())
    place = content.index((305).to_bytes(2, "little"))
    content[place + 8 : place + 12] = (10**8).to_bytes(4, "little")
    return bytes(content)


def odd_exif() -> bytes:
    """Pillow warns when it looks for the orientation."""
    return bytes(file_of(NOISE, "JPEG", exif=BROKEN_EXIF))


KINDS = [
    pytest.param(odd_exif, 3, "Corrupt EXIF data. Expecting to read 12 bytes but only got 6.", id="Pillow"),
    pytest.param(bad_tag, 5, "invalid value offset 100000000", id="tifffile"),
    pytest.param(damaged_fax, 3, "Fax4Decode: ", id="libtiff"),
]


@pytest.fixture(autouse=True)
def _a_new_process() -> Iterator[None]:
    remarks._shown = 0
    yield
    remarks._shown = 0


@pytest.mark.parametrize(("make", "channels", "words"), KINDS)
def test_remarks_on_images_name_them(
    make: Callable[[], bytes], channels: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = make()
    for number in range(2):  # the same words about another file are no repeat
        (tmp_path / f"{number}.x").write_bytes(content)
        with pytest.warns(ImageRemarkWarning) as caught:
            read_image(tmp_path / f"{number}.x", channels)
        (said,) = (str(entry.message) for entry in caught)
        assert said.startswith(f"image {str(tmp_path / f'{number}.x')!r}: ")
        assert words in said
        assert len(said) < 1500
    with kept_remarks() as kept:
        decode_image(content, "kept", channels)
    assert any(words in remark for remark in kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ImageRemarkWarning)
        read_header(content, "header")
    assert capfd.readouterr() == ("", "")


def test_what_was_said_is_part_of_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnreadableImageError, match=r"^cannot read image 'x': .*; LZWDecode: Not enough data") as caught:
        decode_image(damaged_lzw(), "'x'")
    assert caught.value.words == str(caught.value).removeprefix("cannot read image 'x': ")
    with pytest.raises(UnreadableImageError, match=r"; <tifffile.TiffPages @[0-9]+> invalid offset to first page"):
        decode_image(damaged_lzw()[:5000], "'y'")
    assert capfd.readouterr() == ("", "")


def test_words_are_few_and_hold_no_addresses() -> None:
    with overheard() as words:
        for number in range(9):
            warnings.warn(f"line {number} of {object()} and more", stacklevel=1)
        warnings.warn("line 0", stacklevel=1)
        warnings.warn("line 1" * 1000, stacklevel=1)
    assert words[0] == "line 0 of <object object> and more"
    assert len(words) == remarks.LINES + 1
    assert words[-1] == "and 8 more"


def test_others_are_heard_as_before() -> None:
    """Warnings of other threads are not the image's. Filters count, and nothing is left behind."""
    before = warnings.showwarning
    with warnings.catch_warnings(record=True) as elsewhere, overheard() as words:
        warnings.simplefilter("always")
        other = threading.Thread(target=lambda: warnings.warn("elsewhere", stacklevel=1))
        other.start()
        other.join()
        with overheard() as inner:
            warnings.warn("inside", stacklevel=1)
    assert (words, inner) == ([], ["inside"])
    assert [str(entry.message) for entry in elsewhere] == ["elsewhere"]
    assert warnings.showwarning is before
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UnreadableImageError, match="Corrupt EXIF data"):
            decode_image(odd_exif(), "x")


def test_threads_hear_their_own() -> None:
    heard: dict[int, list[str]] = {}

    def decode(number: int) -> None:
        with kept_remarks() as kept:
            for _ in range(5):
                decode_image(odd_exif() if number % 2 else bytes(file_of(NOISE, "JPEG")), str(number))
        heard[number] = kept

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: bool(kept) for number, kept in heard.items()} == {number: bool(number % 2) for number in range(6)}


def test_a_process_shows_some_remarks_and_says_so() -> None:
    content = odd_exif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(remarks.SHOWN + 3):
            decode_image(content, str(number))
    assert len(caught) == remarks.SHOWN
    assert str(caught[-1].message).endswith("(this process shows no more remarks on images)")


def test_a_forked_process_waits_for_nobody() -> None:
    with overheard(), remarks.native_overheard():
        if (child := os.fork()) == 0:
            try:
                decode_image(damaged_lzw(), "x")
            except UnreadableImageError as error:
                os._exit(0 if "LZWDecode" in str(error) else 1)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_without_standard_error() -> None:
    if (child := os.fork()) == 0:
        os.close(2)
        sys.stderr = None  # type: ignore[assignment]
        try:
            decode_image(damaged_lzw(), "x")
        except UnreadableImageError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
