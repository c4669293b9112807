"""Image folders and the bundled photographs."""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data import BundledPhotographs, ImageFolder, UnreadableImageError, read_image
from dinov2.data.decoding_reduced import decode_reduced

GRADIENT = np.arange(24 * 32 * 3).reshape(24, 32, 3).astype(np.uint8)


def save(path: Path, image: np.ndarray = GRADIENT, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def test_any_nesting_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.JPG", "b/c/d/e/deep.webp", "B/1.tiff", "b/10.png"):
        save(tmp_path / name)
    for name in ("notes.txt", "b/labels.csv", "b/._2.png", ".hidden.png"):
        (tmp_path / name).write_text("no image")

    folder = ImageFolder(tmp_path)

    assert folder.paths == ["B/1.tiff", "a.JPG", "b/10.png", "b/2.png", "b/c/d/e/deep.webp"]
    assert len(folder) == 5
    np.testing.assert_array_equal(folder[3], GRADIENT)
    assert ImageFolder(str(tmp_path)).paths == folder.paths


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "image.png")
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "link")
    assert ImageFolder(tmp_path / "root").paths == ["link/image.png"]


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(
        ValueError, match=r"root: expected a folder with images \(.*\.jpg.*\) at any depth, got '.*', which has none"
    ):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("name", ["missing", "file.png"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path / "file.png")
    with pytest.raises(ValueError, match=f"root: expected a folder of images, got '.*{name}', which is not a folder"):
        ImageFolder(tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(GRADIENT).convert(mode)
    path = tmp_path / "image.tiff"
    (source.convert("RGB") if mode == "HSV" else source).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.shape == (24, 32, 3)
    np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")))


def test_16_bit_gray_keeps_its_upper_bits(tmp_path: Path) -> None:
    levels = (np.arange(24 * 32).reshape(24, 32) * 85).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(tmp_path / "image.png")[..., 1], levels >> 8)


def test_float_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(UnreadableImageError, match="32 bits per channel"):
        read_image(tmp_path / "image.tiff")


def test_camera_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn by 90 degrees clockwise to view
    path = save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(GRADIENT, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own remark on one of them
@pytest.mark.parametrize("damage", ["truncated", "zeros", "empty", "text", "header only"])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
def test_damaged_files_say_which(tmp_path: Path, extension: str, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = save(tmp_path / f"image.{extension}", noise)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "zeros": bytes(len(content)),
            "empty": b"",
            "text": b"<html>404</html>",
            "header only": content[:16],
        }[damage]
    )
    with pytest.raises(UnreadableImageError, match=rf"cannot read image '.*image\.{extension}'") as error:
        ImageFolder(tmp_path)[0]
    assert "unpack" not in error.value.words
    assert (error.value.words == "the file is empty") == (damage == "empty")
    with pytest.raises(UnreadableImageError) as error:
        decode_reduced(path.read_bytes(), path.name, 32)
    assert (error.value.words == "the file is empty") == (damage == "empty")


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 // 2 - 1)  # Pillow raises at twice the limit
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(path)


def test_bundled_photographs_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    photographs = BundledPhotographs()
    assert len(photographs) == 20
    assert len(set(photographs.names)) == 20
    for image in photographs:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= 172
        assert image.std() > 10


def test_colour_photographs() -> None:
    photographs = BundledPhotographs(colour_only=True)
    assert len(photographs) == 10
    assert all((image[..., 0] != image[..., 2]).any() for image in photographs)


@pytest.mark.parametrize("module", ["skimage.data", "sklearn.datasets"])
def test_missing_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"BundledPhotographs.*'{module}'.*dinov2-kernels\[demo\]"):
        BundledPhotographs()
