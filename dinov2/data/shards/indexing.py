"""Indexing tars that have no index, for example those of WebDataset, img2dataset or plain ``tar``."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from typing import IO

from dinov2.data.decoding import IMAGE_EXTENSIONS, UnreadableImageError, read_header
from dinov2.data.shards.storage import Storage
from dinov2.data.shards.writing import MAX_SIZE, Row, ShardReport, make_row, write_rows

Progress = Callable[[int, int], None]
"""Called before the first shard and after each shard, with the number of shards done and the number of all."""


class DamagedTarsError(ValueError):
    """Some tars cannot be read. All others have their index now; ``report`` counts them."""

    def __init__(self, message: str, report: ShardReport) -> None:
        super().__init__(message)
        self.report = report


def index_shards(root: str | os.PathLike[str], progress: Progress = lambda done, of: None) -> ShardReport:
    """Write ``root/index/NAME.parquet`` for every ``root/images/NAME.tar`` (or ``root/NAME.tar``) without an index.

    Files of a tar with the same name up to the first dot belong together. The index has the first of them that is an
    image, and the ``url`` in their ``.json`` file. Only plain files are read: links and devices are skipped, and
    nothing is unpacked. Shards with an index are skipped, so a second call finishes an interrupted one. To index a tar
    that has changed, delete its index first.

    Args:
        root: a folder, or a URL of fsspec.
        progress: see :data:`Progress`.

    Returns:
        Counts of images, and of skipped files by reason. ``print`` shows them.

    Raises:
        ValueError: there is no tar.
        DamagedTarsError: some tars cannot be read; it is a ValueError.
        ImportError: pyarrow or fsspec is missing (extra ``data``).
    """
    storage = Storage(root)
    tars, done = storage.shards(), storage.indices()
    if not tars:
        raise ValueError(
            f"root: expected tar shards in it (images/*.tar or *.tar), got {os.fspath(root)!r}, which has none"
        )
    report = ShardReport(finished_before=len(tars.keys() & done.keys()))
    damaged: dict[str, str] = {}
    missing = sorted(tars.keys() - done.keys())
    for number, name in enumerate(missing):
        progress(number, len(missing))
        try:
            with storage.filesystem.open(tars[name], "rb") as file:
                rows, skipped = _read_rows(file)
        except (tarfile.TarError, EOFError, ValueError, OSError) as error:
            damaged[tars[name]] = str(error)
            continue
        with storage.replace(f"{storage.root}/index/{name}.parquet") as file:
            write_rows(rows, file)
        report.shards += 1
        report.images += len(rows)
        report.skipped += skipped
    progress(len(missing), len(missing))
    if damaged:
        details = "".join(f"\n  {path}: {reason}" for path, reason in sorted(damaged.items()))
        message = f"{len(damaged)} of {len(tars)} tars cannot be read; replace or remove them:{details}"
        raise DamagedTarsError(message, report)
    return report


def _read_rows(file: IO[bytes]) -> tuple[list[Row], Counter[str]]:
    """The rows of one tar, and counts of its skipped files by reason."""
    rows: dict[str, Row] = {}
    urls: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all it has seen
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if member.size < 0:  # the reader would go backwards and never end
                raise tarfile.ReadError(f"{member.name!r} has a negative size")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                skipped["no plain file"] += 1
            elif member.size > MAX_SIZE:
                skipped["larger than 2 GiB"] += 1
            elif extension == "json" and stem:
                urls |= _url(key, _content(file, member))
            elif not stem or not name.lower().endswith(IMAGE_EXTENSIONS):  # no stem: a hidden file
                skipped["no image by its name"] += 1
            elif key in rows:
                skipped["second image of a key"] += 1
            else:
                content = _content(file, member)
                try:
                    rows[key] = make_row(key, member.offset_data, content, read_header(content, member.name))
                except UnreadableImageError:
                    skipped["no image by its content"] += 1
        file.seek(tar.offset)
        if 0 < len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:  # tarfile would take this for the end
            raise EOFError("it ends within the header of a file")
    for key, url in urls.items():
        if key in rows:
            rows[key]["url"] = url
    return list(rows.values()), skipped


def _content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    """The bytes of a plain file in a tar."""
    position = file.tell()
    file.seek(member.offset_data)
    content = file.read(member.size)
    file.seek(position)
    if len(content) < member.size:
        raise EOFError(f"it ends within {member.name!r}")
    return content


def _url(key: str, content: bytes) -> dict[str, str]:
    """``{key: url}`` from the metadata of an image; empty if they have no url."""
    try:
        url = json.loads(content)["url"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {key: url} if isinstance(url, str) else {}
