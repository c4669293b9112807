"""Tar shards: written, indexed, read back from disks and through fsspec, and everything that can be wrong with them."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dinov2.data import ShardImage, TarShards, UnreadableImageError, index_shards, write_shard, write_shards
from dinov2.data.shards import storage
from tests.data.files import encode, encode_array, noise, shard_images, write_tar


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place for shards: a folder, or fsspec's file system in memory."""
    if request.param == "folder":
        yield str(tmp_path / "pool")
        return
    filesystem = fsspec.filesystem("memory")
    yield "memory://pool"
    if filesystem.exists("/pool"):
        filesystem.rm("/pool", recursive=True)


def table_of(root: str, name: str) -> dict[str, list]:
    with fsspec.open(f"{root}/index/{name}.parquet") as file:
        return pyarrow.parquet.read_table(file).to_pydict()


def test_written_images_are_read_back(root: str) -> None:
    report = write_shards(iter(shard_images(7)), root, shard_size=3)
    assert (report.shards, report.images, dict(report.skipped)) == (3, 7, {})
    shards = TarShards(root)
    assert [path.rpartition("/")[2] for path in shards.paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert len(shards) == 7
    for i in (6, 0, 3, 2, 5, 1, 4):
        np.testing.assert_array_equal(shards[i], noise(i))
        assert shards.read_bytes(i) == encode(noise(i))
    np.testing.assert_array_equal(shards[-1], noise(6))
    with pytest.raises(IndexError):
        shards[7]


def test_index_says_where_and_what(root: str) -> None:
    jpeg = encode(noise(1, 40, 50), "JPEG")
    images = [ShardImage("a", encode(noise(0)), {"score": 0.5}), ShardImage("b", jpeg, {"url": "https://x.org/b.jpg"})]
    write_shards(images, root)
    table = table_of(root, "00000")
    assert list(table) == ["key", "offset", "size", "width", "height", "url", "sha256", "score"]
    assert table["key"] == ["a", "b"]
    assert table["width"] == [30, 50]
    assert table["height"] == [20, 40]
    assert table["url"] == [None, "https://x.org/b.jpg"]
    assert table["score"] == [0.5, None]
    assert table["sha256"] == [hashlib.sha256(image.content).hexdigest() for image in images]
    with fsspec.open(f"{root}/images/00000.tar") as file:
        content = file.read()
    for image, offset, size in zip(images, table["offset"], table["size"], strict=True):
        assert content[offset : offset + size] == image.content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["a.png", "b.jpg"]


def test_what_is_no_image_is_not_written(root: str) -> None:
    images = [ShardImage("good", encode(noise(0))), ShardImage("bad", b"<html>404</html>")]
    report = write_shards(images, root)
    assert report.images == 1
    assert str(report) == "1 images in 1 shards\n  skipped 1: no image by its content"
    assert len(TarShards(root)) == 1


def test_writer_refuses(tmp_path: Path) -> None:
    write_shards(shard_images(1), tmp_path)
    with pytest.raises(ValueError, match=r"root: expected a folder or URL without shards, got '.*', which has some"):
        write_shards(shard_images(1), tmp_path)
    with pytest.raises(ValueError, match="shard_size: expected at least 1, got 0"):
        write_shards(shard_images(1), tmp_path / "other", shard_size=0)
    with pytest.raises(ValueError, match="key: expected a key of its own for each image of a shard, got '0000"):
        write_shards(shard_images(1) * 2, tmp_path / "other")
    assert not list((tmp_path / "other").rglob("*.*"))  # neither a shard nor a part of one
    for key in ("", "../up", "a.b", "a/b", "ä"):
        with pytest.raises(ValueError, match="key: expected letters"):
            ShardImage(key, b"")
    with pytest.raises(ValueError, match=r"columns: expected none of .*, got offset, sha256"):
        ShardImage("a", b"", {"sha256": "", "offset": 0, "url": ""})


def test_a_shard_can_be_written_again(root: str) -> None:
    write_shard(shard_images(2), root, 5)
    write_shard(shard_images(3, first=10), root, 5)
    np.testing.assert_array_equal(TarShards(root)[2], noise(12))


def foreign_tar(path: Path) -> Path:
    """All that a tar from elsewhere may hold; images 0, 9, 1, 2 and 3 count."""
    link, device = tarfile.TarInfo("c.png"), tarfile.TarInfo("d.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    hard = tarfile.TarInfo("e.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.png"
    folder = tarfile.TarInfo("sub/")
    folder.type = tarfile.DIRTYPE
    return write_tar(
        path,
        [
            ("a.json", json.dumps({"url": "https://x.org/a"}).encode()),
            ("a.png", encode(noise(0))),
            ("a.txt", b"a caption"),
            ("a.seg.png", encode(noise(9))),
            (link, b""),
            (device, b""),
            (hard, b""),
            (folder, b""),
            ("../../up.jpg", encode(noise(1, 32, 32), "JPEG")),
            ("sub/b.npy", encode_array(np.zeros(512, np.float16))),  # an embedding
            ("sub/b.webp", encode(noise(2), "WEBP")),
            ("b.json", b"not json"),
            ("b.png", encode(noise(3))),
            ("._b.png", b"a companion of macOS"),
            ("f.jpg", b""),
            ("g" * 150 + ".cls", b"3"),  # a name of more than one block
        ],
    )


def test_foreign_tars_get_an_index(tmp_path: Path) -> None:
    root = tmp_path / "within" / "pool"
    foreign_tar(root / "shard-7.tar")
    (root / "notes.txt").write_text("no tar")
    report = index_shards(root)
    assert (report.shards, report.images, report.finished_before) == (1, 5, 0)
    assert dict(report.skipped) == {
        "no plain file": 3,
        ".txt": 1,
        ".cls": 1,
        "hidden": 1,
        "no image by its content": 2,
    }
    assert report.shared_names == 2
    table = table_of(str(root), "shard-7")
    assert table["key"] == ["a", "a.seg", "../../up", "sub/b", "b"]
    assert table["url"] == ["https://x.org/a", "https://x.org/a", None, None, None]
    shards = TarShards(root)
    np.testing.assert_array_equal(shards[0], noise(0))
    np.testing.assert_array_equal(shards[1], noise(9))
    np.testing.assert_array_equal(shards[4], noise(3))
    assert shards[2].shape == (32, 32, 3)
    assert not list(tmp_path.rglob("up.*"))  # nothing was unpacked


def test_indexing_again_does_only_what_is_missing(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / "images" / f"{i}.tar", [(f"{i}.png", encode(noise(i)))])
    index_shards(tmp_path)
    (tmp_path / "index" / "1.parquet").unlink()
    kept = (tmp_path / "index" / "0.parquet").stat().st_mtime_ns
    report = index_shards(tmp_path)
    assert (report.shards, report.images, report.finished_before) == (1, 1, 2)
    assert "2 more shards had an index already" in str(report)
    assert (tmp_path / "index" / "0.parquet").stat().st_mtime_ns == kept
    assert index_shards(tmp_path).finished_before == 3


def test_the_index_is_that_of_the_writer(tmp_path: Path) -> None:
    write_shards(shard_images(3), tmp_path)
    written = table_of(str(tmp_path), "00000")
    (tmp_path / "index" / "00000.parquet").unlink()
    index_shards(tmp_path)
    assert table_of(str(tmp_path), "00000") == written | {"url": [None] * 3}


def with_negative_size(content: bytes, size: int = -1024) -> bytes:
    """The first header of a tar says a size below 0, by the extension of GNU, under a correct checksum."""
    header = bytearray(content[:512])
    header[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


@pytest.mark.parametrize("damage", ["truncated", "no tar", "empty", "negative size"])
def test_a_damaged_tar_keeps_no_other_from_its_index(tmp_path: Path, damage: str) -> None:
    write_tar(tmp_path / "good.tar", [("a.png", encode(noise(0)))])
    bad = write_tar(tmp_path / "bad.tar", [("a.png", encode(noise(0))), ("b.png", encode(noise(1)))])
    content = bad.read_bytes()
    damaged = {
        "truncated": content[: 3 * 1024],
        "no tar": b"x" * 2000,
        "empty": b"",
        "negative size": with_negative_size(content),
    }
    bad.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"1 of 2 tars cannot be read; replace or remove them:\n  .*bad\.tar: "):
        index_shards(tmp_path)
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["good.parquet"]
    with pytest.raises(ValueError, match=r"lacks the indices of 1 of 2 tars: bad\.tar; .*dinov2 index "):
        TarShards(tmp_path)


def test_missing_shards_are_named(root: str) -> None:
    write_shards(shard_images(5), root, shard_size=1)
    filesystem, path = fsspec.core.url_to_fs(root)
    for name in ("00001", "00003"):
        filesystem.rm(f"{path}/images/{name}.tar")
    with pytest.raises(ValueError, match=r"got '.*', which lacks 2 of 5 tars: 00001\.tar, 00003\.tar"):
        TarShards(root)


def test_no_shards(tmp_path: Path) -> None:
    for make in (TarShards, index_shards):
        with pytest.raises(
            ValueError, match=r"root: expected tar shards in it \(images/\*\.tar or \*\.tar\), got '.*', which has none"
        ):
            make(tmp_path)


def test_damaged_index_is_named(tmp_path: Path) -> None:
    write_shards(shard_images(2), tmp_path, shard_size=1)
    (tmp_path / "index" / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"index '.*00001\.parquet' cannot be read; write it again: "):
        TarShards(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "index" / "00001.parquet")
    with pytest.raises(ValueError, match=r"00001\.parquet' cannot be read.*offset"):
        TarShards(tmp_path)


def test_shards_that_fail_later_are_unreadable_images(root: str) -> None:
    write_shards(shard_images(6), root, shard_size=2)
    shards = TarShards(root)
    filesystem, path = fsspec.core.url_to_fs(root)
    filesystem.rm(f"{path}/images/00001.tar")
    filesystem.pipe_file(f"{path}/images/00002.tar", filesystem.cat_file(f"{path}/images/00002.tar")[:1000])
    np.testing.assert_array_equal(shards[1], noise(1))
    for index, reason in {
        2: r"bytes at 512 in '.*00001\.tar'",
        4: r"in '.*00002\.tar': the shard ends after 488 of them",
        5: r"in '.*00002\.tar'",
    }.items():
        with pytest.raises(UnreadableImageError, match=f"cannot read image of .*{reason}"):
            shards[index]


@pytest.mark.parametrize(
    ("offset", "size"), [(-5, 100), (0, 100), (10**15, 100), (512, -1), (512, 0), (2**62, 2**31 - 1)]
)
def test_wrong_offsets_are_unreadable_images(root: str, offset: int, size: int) -> None:
    write_shards(shard_images(2), root)
    table = pyarrow.table({"offset": [offset, 512], "size": [size, len(encode(noise(0)))]})
    with fsspec.open(f"{root}/index/00000.parquet", "wb") as file:
        pyarrow.parquet.write_table(table, file)
    shards = TarShards(root)
    with pytest.raises(UnreadableImageError, match=rf"cannot read image of {size} bytes at {offset} in '.*00000\.tar'"):
        shards[0]
    np.testing.assert_array_equal(shards[1], noise(0))


def test_open_files_are_bounded_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 4)
    write_shards(shard_images(12), tmp_path, shard_size=1)

    def open_tars() -> int:
        opened = map(os.path.realpath, Path("/proc/self/fd").iterdir())
        return sum(path.endswith(".tar") and Path(path).is_relative_to(tmp_path) for path in opened)

    shards = TarShards(tmp_path)
    assert open_tars() == 0
    for i in (*range(12), *range(12)):
        np.testing.assert_array_equal(shards[i], noise(i))
    assert open_tars() == 4
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy[3], noise(3))
    assert open_tars() == 5
    del shards, copy
    assert open_tars() == 0


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_too(root: str, start: str) -> None:
    if start == "spawn" and root.startswith("memory"):
        pytest.skip("what is in memory is in this process only")
    write_shards(shard_images(3), root, shard_size=2)
    shards = TarShards(root)
    expected = [shards.read_bytes(i) for i in range(3)]
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.map(shards.read_bytes, range(3)) == expected


def test_forked_processes_connect_anew(root: str) -> None:
    write_shards(shard_images(1), root)
    shards = TarShards(root)
    parent = shards._read._filesystem
    process = multiprocessing.get_context("fork")
    receiver, sender = process.Pipe()

    def child() -> None:
        shards.read_bytes(0)
        sender.send((shards._read._process == os.getpid(), shards._read._filesystem is parent))

    worker = process.Process(target=child)
    worker.start()
    is_local = not root.startswith("memory")
    assert receiver.recv() == (not is_local, is_local)
    worker.join()


def test_a_million_rows_are_read_quickly(tmp_path: Path) -> None:
    shards, rows = 100, 10_000
    for folder in ("images", "index"):
        (tmp_path / folder).mkdir()
    for i in range(shards):
        (tmp_path / "images" / f"{i:05d}.tar").touch()
        table = {"offset": np.arange(rows) * 110_080 + 512, "size": np.full(rows, 109_000 + i, np.int32)}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "index" / f"{i:05d}.parquet")
    start = time.perf_counter()
    dataset = TarShards(tmp_path)
    assert time.perf_counter() - start < 5  # 0.2 s on a free machine
    assert len(dataset) == shards * rows
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 12 * len(dataset) + 8 * shards
    with pytest.raises(UnreadableImageError, match=rf"of 109042 bytes at {9999 * 110_080 + 512} in '.*/00042\.tar'"):
        dataset[43 * rows - 1]


@pytest.mark.parametrize("module", ["pyarrow.parquet", "fsspec"])
def test_missing_extra_is_named(tmp_path: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(shard_images(1), tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package '{module}'.*dinov2-kernels\[data\]"):
        TarShards(tmp_path)
