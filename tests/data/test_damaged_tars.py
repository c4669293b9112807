"""Tars with damaged headers, without an end, joined, compressed, or with odd names: nothing is lost without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import shutil
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from dinov2.data import DamagedTarsError, DamagedTarWarning, TarShards, image_names, index_shards, unescaped
from dinov2.data.shards import indexing, storage
from tests.data.files import encode, noise, write_tar
from tests.data.test_files import NAMES, image_files

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(names: list[str], kind: str = "gnu") -> tuple[bytes, list[int], int]:
    """A tar of images ``noise(0)``, ``noise(1)``, ..., the places of their headers, and the place of the end mark."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind], encoding="utf-8", errors="surrogateescape") as tar:
        for i, name in enumerate(names):
            content = encode(noise(i))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        end = tar.offset
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        return file.getvalue(), [member.offset for member in tar], end


WHOLE, HEADERS, END = tar_of(["0.png", "1.png", "2.png"])
DATA_END = HEADERS[2] + 512 + len(encode(noise(2)))


def damaged(*headers: int) -> bytes:
    """The tar with another digit in the checksum of some headers."""
    content = bytearray(WHOLE)
    for header in headers:
        content[HEADERS[header] + 150] = ord("9")
    return bytes(content)


def zeroed(start: int, stop: int) -> bytes:
    return WHOLE[:start] + bytes(stop - start) + WHOLE[stop:]


def indexed(folder: Path) -> list[int]:
    """The numbers of the images in the index of ``a.tar``."""
    keys = pyarrow.parquet.read_table(folder / "index" / "a.parquet")["key"].to_pylist()
    shards, numbers = TarShards(folder), [int(key) for key in keys]
    for row, number in enumerate(numbers):
        np.testing.assert_array_equal(shards[row], noise(number))
    return numbers


SECOND = f"{HEADERS[1]:,}"
UNREADABLE = "hold no readable header and were skipped"


@pytest.mark.parametrize(
    ("content", "images", "parts", "message"),
    [
        (damaged(0), [1, 2], 1, rf"{HEADERS[1]:,} bytes at 0 {UNREADABLE}"),
        (damaged(1), [0, 2], 1, rf"{HEADERS[2] - HEADERS[1]:,} bytes at {SECOND} {UNREADABLE}"),
        (damaged(0, 1), [2], 1, rf"{HEADERS[2]:,} bytes at 0 {UNREADABLE}"),
        (zeroed(HEADERS[1], HEADERS[1] + 512), [0, 2], 1, rf" bytes at {HEADERS[1] + 512:,} {UNREADABLE}"),
        (zeroed(HEADERS[2], HEADERS[2] + 512), [0, 1], 1, rf" bytes at {HEADERS[2] + 512:,} {UNREADABLE}"),
        (zeroed(HEADERS[1], HEADERS[2]), [0, 2], 0, rf"goes on behind an end mark, at byte {HEADERS[2]:,}"),
        (WHOLE[: HEADERS[1]] + b"x" * 1024 + WHOLE[HEADERS[1] :], [0, 1, 2], 1, rf"1,024 bytes at {SECOND} "),
        (WHOLE[: HEADERS[1]] + bytes(512) + WHOLE[HEADERS[1] :], [0, 1, 2], 0, r"goes on behind an end mark"),
        (WHOLE + b"x" * 4000, [0, 1, 2], 1, rf"4,000 bytes at {len(WHOLE):,} {UNREADABLE}"),
        (WHOLE[:END], [0, 1, 2], 0, "no end mark, so its end may be missing"),
        (WHOLE[:DATA_END], [0, 1, 2], 0, "no end mark, so its end may be missing"),
        (WHOLE[: HEADERS[2]], [0, 1], 0, "no end mark, so its end may be missing"),
        (tar_of(["0.png"])[0] + zeroed(HEADERS[0], HEADERS[1]), [0, 1, 2], 0, "goes on behind an end mark"),
    ],
)
def test_what_can_be_read_is_indexed_and_the_rest_is_told(
    tmp_path: Path, content: bytes, images: list[int], parts: int, message: str
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.warns(DamagedTarWarning, match=rf"a\.tar: .*{message}"):
        report = index_shards(tmp_path)
    assert report.skipped["damaged part of a tar"] == parts
    assert indexed(tmp_path) == images


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (damaged(2), rf"it is damaged from byte {HEADERS[2]:,} on, and no file can be found behind that"),
        (WHOLE[: HEADERS[1]] + b"x" * 100 + WHOLE[HEADERS[1] :], rf"it is damaged from byte {SECOND} on"),
        (damaged(0, 1, 2), "it is no tar: it begins with b'0.png"),
        (b"<html>404</html>" * 100, "it is no tar: it begins with b'<html>40'"),
        (gzip.compress(WHOLE), "it is compressed with gzip"),
        (bz2.compress(WHOLE), "it is compressed with bzip2"),
        (WHOLE[: DATA_END - 1], "it ends within '2.png'"),
        (WHOLE[: HEADERS[2] + 511], "it ends within the header of a file"),
        (b"", "it is empty"),
    ],
)
def test_a_tar_that_may_lack_much_is_an_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    write_tar(tmp_path / "b.tar", [("b.png", encode(noise(0)))])
    with pytest.raises(DamagedTarsError) as caught:
        index_shards(tmp_path)
    assert f"a.tar: {reason}" in str(caught.value)
    assert caught.value.report.images == 1
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["b.parquet"]


def test_a_tar_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    with pytest.warns(DamagedTarWarning, match=r"a\.tar: it holds no file$"):
        assert index_shards(tmp_path).images == 0


def test_an_extension_that_claims_too_much(tmp_path: Path) -> None:
    """A long name of 8 GB would be read into memory; a header without its long name is no header."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = b"L", 8_000_000_000
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + WHOLE)
    with pytest.warns(DamagedTarWarning, match=rf"512 bytes at 0 {UNREADABLE}"):
        index_shards(tmp_path)
    assert indexed(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_tars_of_every_format_are_no_warning(tmp_path: Path, kind: str) -> None:
    longest = 90 if kind == "ustar" else 200
    names = [f"{'d' * longest}/{i}.png" for i in range(3)]
    (tmp_path / "a.tar").write_bytes(tar_of(names, kind)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = index_shards(tmp_path)
    assert (report.images, report.skipped) == (3, {})
    assert image_names(TarShards(tmp_path)) == [f"a/{name.removesuffix('.png')}" for name in names]


def test_metadata_that_no_table_takes(tmp_path: Path) -> None:
    files = [("a.json", b"[" * 100_000), ("b.json", b'{"url": "http://x.org/\\ud800"}')]
    write_tar(tmp_path / "a.tar", [*files, ("a.png", encode(noise(0))), ("b.png", encode(noise(1)))])
    index_shards(tmp_path)
    table = pyarrow.parquet.read_table(tmp_path / "index" / "a.parquet").to_pydict()
    assert table["url"] == [None, "http://x.org/\\ud800"]


# --- names


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_names_that_gnu_tar_writes(tmp_path: Path, kind: str) -> None:
    tar = shutil.which("tar")
    if tar is None or b"GNU tar" not in subprocess.run([tar, "--version"], capture_output=True).stdout:
        pytest.skip("GNU tar is not installed")
    source, pool = tmp_path / "source", tmp_path / "pool"
    image_files(source)
    pool.mkdir()
    subprocess.run([tar, f"--format={kind}", "-cf", pool / os.fsdecode(b"caf\xe9.tar"), "."], cwd=source, check=True)
    assert index_shards(pool).images == len(NAMES)
    shards = TarShards(pool)
    for row, text in enumerate(image_names(shards)):
        shard, _, key = text.partition("/")
        assert shard == r"caf\xe9"
        assert shards.read_bytes(row) == (source / f"{unescaped(key)}.png").read_bytes()


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_names_that_pythons_tarfile_writes(tmp_path: Path, kind: str) -> None:
    names = [os.fsdecode(name) for name in NAMES]
    (tmp_path / "a.tar").write_bytes(tar_of(names, kind)[0])
    assert index_shards(tmp_path).images == len(names)
    keys = [name.partition("/")[2] for name in image_names(TarShards(tmp_path))]
    assert [unescaped(key) for key in keys] == [name.removesuffix(".png") for name in names]


def test_a_tar_whose_index_has_no_name_keeps_no_other_from_its_index(tmp_path: Path) -> None:
    for name in ("a" * 251, "b", "c" * 240):
        (tmp_path / f"{name}.tar").write_bytes(WHOLE)
    with pytest.raises(DamagedTarsError, match=r"1 of 3 tars .*\n  .*aaa\.tar: its index cannot be written: File name"):
        index_shards(tmp_path)
    assert sorted(path.name[0] for path in (tmp_path / "index").iterdir()) == ["b", "c"]


@pytest.mark.parametrize("error", [TypeError("odd"), KeyError("size"), OverflowError("int32"), OSError(5, "I/O error")])
def test_any_error_of_one_tar_names_it(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of([f"{name}.png"])[0])
    write_rows = indexing.write_rows

    def fails(rows: list[dict[str, object]], file: object) -> None:
        if rows[0]["key"] == "b":
            raise error
        write_rows(rows, file)

    monkeypatch.setattr(indexing, "write_rows", fails)
    with pytest.raises(DamagedTarsError, match=r"1 of 3 tars .*\n  .*b\.tar: "):
        index_shards(tmp_path)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["a.parquet", "c.parquet"]


def test_a_full_disk_ends_the_indexing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tar").write_bytes(WHOLE)
    write_rows, written = indexing.write_rows, list[object]()

    def full(rows: object, file: object) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(rows)
        write_rows(rows, file)

    monkeypatch.setattr(indexing, "write_rows", full)
    with pytest.raises(OSError, match=r"b\.tar: its index cannot be written: No space left on device; tars before it"):
        index_shards(tmp_path)
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["a.parquet"]


def test_a_folder_that_cannot_be_written_is_told_before_any_tar_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(WHOLE)

    def refuses(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuses)
    monkeypatch.setattr(indexing, "_index", lambda *_: pytest.fail("a tar was read"))
    with pytest.raises(PermissionError, match=r"folder '.*/index' cannot be written: Permission denied"):
        index_shards(tmp_path)
