"""Folders as people have them: what of them is read, and that everything else is counted."""

from __future__ import annotations

import os
import sys
import tarfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dinov2.data import (
    DataConfig,
    ImageFolder,
    SourceWarning,
    TarShards,
    UnreadableImageError,
    index_shards,
    open_dataset,
    write_shards,
)
from dinov2.data import formats as formats_module
from dinov2.data.folders import images_among, is_of_tars
from dinov2.data.formats import image_extensions, known_formats
from dinov2.data.shards.storage import Storage
from tests.data.files import encode, noise, shard_images, write_tar

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80)


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def left_out_of(root: Path) -> dict[str, str]:
    storage = Storage(root)
    return images_among(storage.paths(), storage).left_out


# --- what is read


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.mpo", "JPEG"), ("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("A.JPG", "JPEG"), ("a.b.c.jpeg", "JPEG")),
        *(("a.j2k", "JPEG2000"), ("a.j2c", "JPEG2000"), ("a.jpc", "JPEG2000"), ("a.jpf", "JPEG2000")),
        *(("a.jpx", "JPEG2000"), ("a.pnm", "PPM"), ("a.pbm", "PPM"), ("a.apng", "PNG"), ("a.dib", "BMP")),
        *(("A.DIB", "DIB"), ("a.avifs", "AVIF"), ("a", "PNG"), ("a.dat", "WEBP"), ("a.1", "GIF"), ("a.", "TIFF")),
        *(("a.jpg_original", "JPEG"), ("a.png~", "PNG"), ("IMG 2024.01.02", "AVIF"), ("a.php", "BMP")),
        *(("a.bin", "JPEG2000"), ("a.x", "PPM"), ("a.gif", "PNG"), ("a.heic", "JPEG"), ("a.JXL", "PNG")),
    ],
)
def test_images_of_every_name_are_read(tmp_path: Path, name: str, kind: str) -> None:
    folder = ImageFolder(write(tmp_path, {name: encode(noise(0), kind)}))
    assert folder.paths == [name]
    assert folder[0].shape == (20, 30, 3)


def test_what_is_left_out_is_counted_by_its_ending(tmp_path: Path) -> None:
    raw = encode(noise(0), "TIFF")  # as cameras write it: a TIFF whose first image is a preview
    others = {
        "a.TXT": b"",
        "b.txt": encode(noise(0)),  # texts are not opened
        "c.mp4": b"\0\0\0\x18ftypisom" + bytes(80),
        "d.heic": HEIC,
        "e.NEF": raw,
        "README": b"BMW and P1 and so on",
        "f.123456": b"",
        "g.py": b"Python",
        "h.php": b"P6 is no image",
        "i.zip": b"PK",
        "deep/er.tar": b"",
        "j.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        ".hidden/1.png": encode(noise(1)),
        "k/._1.png": b"a companion of macOS",
        "k/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg": encode(noise(2), "JPEG"),
        "__MACOSX/k/1.png": encode(noise(3)),
        "Thumbs.db": b"\xd0\xcf\x11\xe0",
        ".DS_Store": b"",
    }
    write(tmp_path, {"1.png": encode(noise(0)), **others})
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        folder = ImageFolder(tmp_path)
    assert folder.paths == ["1.png"]
    assert left_out_of(tmp_path) == {
        "a.TXT": ".txt",
        "b.txt": ".txt",
        "c.mp4": ".mp4",
        "d.heic": ".heic (install pillow-heif to read it)",
        "e.NEF": ".nef",
        "README": "without an ending",
        "f.123456": "without an ending",
        "g.py": ".py",
        "h.php": ".php",
        "i.zip": ".zip",
        "deep/er.tar": ".tar",
        "j.eps": ".eps",
        ".hidden/1.png": "hidden",
        "k/._1.png": "hidden",
        "k/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg": "of the system",
        "__MACOSX/k/1.png": "of the system",
        "Thumbs.db": ".db",
        ".DS_Store": "hidden",
        "gone": "that cannot be opened",
        "pipe": "that cannot be opened",
    }
    line = next(str(one.message) for one in said if one.category is SourceWarning)
    assert line == (
        "left out 20 files: 1 .heic (install pillow-heif to read it), 3 hidden, 2 .txt, 2 of the system, 2 that cannot"
        f" be opened, 2 without an ending, 1 .db, 1 .eps, 6 others under '{tmp_path}'"
    )


def test_a_folder_of_images_alone_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": encode(noise(0)), "2.jpg": encode(noise(1), "JPEG")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageFolder(tmp_path)) == 2
    assert left_out_of(tmp_path) == {}


def test_a_folder_without_images_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"a.heic": HEIC, "b.HEIC": HEIC, "c.txt": b""})
    with pytest.raises(ValueError, match=r"has none; left out 3 files: 2 \.heic \(install pillow-heif .*\), 1 \.txt$"):
        ImageFolder(tmp_path)


# --- plug-ins of Pillow


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package pillow_heif whose HEIF files are PNG files behind a header."""

    class Reader(PngImagePlugin.PngImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self.fp.seek(len(HEIC))
            super()._open()

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Reader, lambda beginning: beginning[4:12] == b"ftypheic"))
        Image.ID.append("HEIF")

    module = types.ModuleType("pillow_heif")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    caches = (known_formats, image_extensions)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()
    Image.ID.remove("HEIF")


def test_a_plug_in_is_used_if_it_is_there(tmp_path: Path, plug_in: None) -> None:
    content = HEIC + encode(noise(4))
    folder = ImageFolder(write(tmp_path, dict.fromkeys(("1.HEIC", "2.hif", "3.jpg", "4"), content)))
    assert folder.paths == ["1.HEIC", "2.hif", "3.jpg", "4"]
    for image in folder:
        np.testing.assert_array_equal(image, noise(4))
    assert "HEIF" in known_formats()
    assert formats_module.missing_plug_in(HEIC) is None


def test_a_missing_plug_in_is_named(tmp_path: Path) -> None:
    folder = ImageFolder(write(tmp_path, {"an iPhone's.jpg": HEIC}))
    with pytest.raises(UnreadableImageError, match="it needs the package pillow-heif"):
        folder[0]


# --- tars and images


def test_a_tar_beside_images_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.png": encode(noise(i)) for i in range(3)})
    write_tar(tmp_path / "old.tar", [("9.png", encode(noise(9)))])
    with pytest.warns(SourceWarning, match=r"left out 1 tar \('old\.tar'\) under .*, because images lie beside"):
        images = open_dataset(DataConfig(root=tmp_path))
    assert isinstance(images, ImageFolder)
    assert images.paths == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("beside", [1, 2, 3])
def test_of_indexed_tars_and_images_the_larger_part_is_read(tmp_path: Path, beside: int) -> None:
    write_tar(tmp_path / "pool.tar", [(f"{i}.png", encode(noise(i))) for i in range(2)])
    index_shards(tmp_path)
    write(tmp_path, {f"a/{i}.JPG": encode(noise(i), "JPEG") for i in range(beside)} | {"notes.txt": b""})
    if beside < 2:
        said, kind = r"left out 1 file: 1 \.jpg under .*, because the tars there hold more images; they", TarShards
    else:
        said, kind = r"left out 1 tar \('pool\.tar'\) under .*, because images lie beside; ", ImageFolder
    with pytest.warns(SourceWarning, match=said):
        images = open_dataset(DataConfig(root=tmp_path))
    assert isinstance(images, kind)
    assert len(images) == max(2, beside)
    write_tar(tmp_path / "new.tar", [("8.png", encode(noise(8)))])
    with pytest.warns(SourceWarning, match=r"left out 2 tars \("):
        assert isinstance(open_dataset(DataConfig(root=tmp_path)), ImageFolder)


def test_tars_elsewhere_are_left_out_and_named(tmp_path: Path) -> None:
    write_shards(shard_images(2), tmp_path)
    for name in ("top.tar", "images/deep/er.tar", ".hidden.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [("9.png", encode(noise(9)))])
    with pytest.warns(
        SourceWarning, match=r"left out 2 tars \('er\.tar', 'top\.tar'\) under .*from one folder, images"
    ):
        assert len(open_dataset(DataConfig(root=tmp_path))) == 2


def test_a_damaged_index_beside_an_image(tmp_path: Path) -> None:
    write_shards(shard_images(2), tmp_path)
    write(tmp_path, {"index/00000.parquet": b"", "1.png": encode(noise(1))})
    with pytest.warns(SourceWarning, match="hold more"), pytest.raises(ValueError, match="cannot be read; write it ag"):
        open_dataset(DataConfig(root=tmp_path))


def test_tars_alone_say_nothing(tmp_path: Path) -> None:
    write_shards(shard_images(2), tmp_path)
    write(tmp_path, {"notes.txt": b"", "images/00000.json": b"{}", ".hidden.png": encode(noise(0))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(open_dataset(DataConfig(root=tmp_path)), TarShards)


def test_urls(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    try:
        for name, content in {"a.heic": HEIC, "b.txt": b"", "c": encode(noise(0)), "d/e.png": encode(noise(1))}.items():
            filesystem.pipe(f"/folders/{name}", content)
        storage = Storage("memory://folders")
        contents = images_among(storage.paths(), storage)
        assert contents.images == ["c", "d/e.png"]
        assert str(contents) == "2 files: 1 .heic (install pillow-heif to read it), 1 .txt"
        assert not is_of_tars(storage, "memory://folders", storage.paths())
        with pytest.raises(ValueError, match=r"root: expected tar shards in a URL, got .*, which has 2 image files"):
            open_dataset(DataConfig(root="memory://folders"))
    finally:
        filesystem.rm("/folders", recursive=True)


# --- names in tars


def test_every_image_of_a_tar_keeps_its_name(tmp_path: Path) -> None:
    names = {
        "IMG.2024.01.jpg": "IMG.2024.01",
        "IMG.2024.02.jpg": "IMG.2024.02",
        "./b/x.png": "b/x",
        "b/x.jpg": "b/x.jpg",  # the key of the image before it is taken
        "b/x.jpg.png": "b/x.jpg.png",
        "c.d/e": "c.d/e",
        "f/" * 60 + "g.JPEG": "f/" * 60 + "g",  # a long name
        "ü" * 120 + ".png": "ü" * 120,
        "h.dat": "h.dat",
        "i.json.png": "i.json",
    }
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        root = tmp_path / str(form)
        root.mkdir()
        with tarfile.open(root / "a.tar", "w", format=form) as tar:
            for seed, name in enumerate(names):
                content = encode(noise(seed))
                (tmp_path / "file").write_bytes(content)
                tar.add(tmp_path / "file", name)
            (tmp_path / "file").write_bytes(b'{"url": "https://x.org/1"}')
            tar.add(tmp_path / "file", "IMG.2024.02.json")
        report = index_shards(root)
        assert (report.images, dict(report.skipped), report.shared_names) == (len(names), {}, 5)
        shards = TarShards(root)
        assert shards.names() == [f"a/{key}" for key in names.values()]
        for seed in range(len(names)):
            np.testing.assert_array_equal(shards[seed], noise(seed))


def test_what_else_a_tar_holds_is_counted(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("1.png", encode(noise(1))),
            ("._1.png", b"macOS"),
            ("__MACOSX/1.png", encode(noise(2))),
            ("@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", encode(noise(3))),
            (".git/2.png", encode(noise(4))),
            ("Thumbs.db", b""),
            ("3.heic", HEIC),
            ("4.png", b""),
            ("1.png", encode(noise(5))),  # as tar --append writes a newer version
            ("5.txt", encode(noise(6))),
        ],
    )
    report = index_shards(tmp_path)
    assert dict(report.skipped) == {
        "hidden": 2,
        "of the system": 2,
        ".db": 1,
        ".heic (install pillow-heif to read it)": 1,
        "no image by its content": 1,
        "replaced by a later file of its name": 1,
        ".txt": 1,
    }
    assert len(TarShards(tmp_path)) == 1
    np.testing.assert_array_equal(TarShards(tmp_path)[0], noise(5))
