"""An index for tars that have none, as WebDataset, img2dataset or plain ``tar`` write them."""

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
"""Told after each shard, and before the first: how many are done, and how many there are to do."""


class DamagedTarsError(ValueError):
    """Some tars cannot be read; ``report`` is about the others, which have got their index."""

    def __init__(self, message: str, report: ShardReport) -> None:
        super().__init__(message)
        self.report = report


def index_shards(root: str | os.PathLike[str], progress: Progress = lambda done, of: None) -> ShardReport:
    """Write ``root/index/NAME.parquet`` for every ``root/images/NAME.tar`` (or ``root/NAME.tar``) that has none.

    Files of a tar with the same name up to the first dot belong together; the first of them that is an image counts,
    and the ``url`` in a ``.json`` file beside it. Links, devices and all else that is no plain file are left alone, and
    names are but names: nothing is unpacked. Shards with an index are skipped, so an interrupted call is finished by
    calling again; to index a tar that has changed, delete its index first.

    Args:
        root: a folder, or a URL of fsspec.
        progress: called as :data:`Progress` says.

    Returns:
        How many images there are, and what was skipped. ``print`` shows it.

    Raises:
        ValueError: there is no tar.
        DamagedTarsError: some cannot be read; a ValueError.
        ImportError: pyarrow or fsspec is missing (extra ``data``).
    """
    storage = Storage(root)
    tars, done = storage.shards(), storage.indices()
    if not tars:
        raise ValueError(f"root must hold tar shards (images/*.tar or *.tar), but {os.fspath(root)!r} has none")
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
        message = f"{len(damaged)} of {len(tars)} tars cannot be read, replace or remove them:{details}"
        raise DamagedTarsError(message, report)
    return report


def _read_rows(file: IO[bytes]) -> tuple[list[Row], Counter[str]]:
    """The rows of one tar, and what is not in them, by reason."""
    rows: dict[str, Row] = {}
    urls: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all it has seen
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if member.size < 0:  # would lead backwards, for ever
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
        if 0 < len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:  # which tarfile takes for the end
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
    """``{key: url}`` by the metadata beside an image, nothing if they do not say."""
    try:
        url = json.loads(content)["url"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {key: url} if isinstance(url, str) else {}
