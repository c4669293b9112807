"""Indexing tars that have no index, for example those of WebDataset, img2dataset or plain ``tar``."""

from __future__ import annotations

import errno
import json
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import IO

from dinov2.data.decoding import IMAGE_EXTENSIONS, UnreadableImageError, read_header
from dinov2.data.files import escaped, quoted, shown
from dinov2.data.shards.members import Findings, members
from dinov2.data.shards.storage import Storage
from dinov2.data.shards.writing import MAX_SIZE, Row, ShardReport, make_row, write_rows

Progress = Callable[[int, int], None]
"""Called before the first shard and after each shard, with the number of shards done and the number of all."""


DAMAGED = "damaged part of a tar"


class DamagedTarWarning(UserWarning):
    """Parts of a tar are damaged and were skipped, or its end is not as it should be."""


class DamagedTarsError(ValueError):
    """Some tars have no index, because they cannot be read. All others have theirs now; ``report`` counts them."""

    def __init__(self, message: str, report: ShardReport) -> None:
        super().__init__(message)
        self.report = report


class FullStorageError(OSError):
    """No index can be written any more."""


def index_shards(root: str | os.PathLike[str], progress: Progress = lambda done, of: None) -> ShardReport:
    r"""Write ``root/index/NAME.parquet`` for every ``root/images/NAME.tar`` (or ``root/NAME.tar``) without an index.

    Files of a tar with the same name up to the first dot belong together. The index has the first of them that is an
    image, and the ``url`` in their ``.json`` file. Only plain files are read: links and devices are skipped, and
    nothing is unpacked. A file whose header in the tar is damaged is skipped, counted and warned of, if other files
    follow. In names that are not UTF-8, other bytes become ``\xNN`` (see :func:`~dinov2.data.escaped`). Shards with an
    index are skipped, so a second call finishes an interrupted one. To index a tar that has changed, delete its index
    first.

    Args:
        root: a folder, or a URL of fsspec.
        progress: see :data:`Progress`.

    Returns:
        Counts of images, and of skipped files by reason. ``print`` shows them.

    Raises:
        ValueError: there is no tar.
        DamagedTarsError: some tars cannot be read; it is a ValueError.
        OSError: the folder of indices cannot be written, or its disk is full.
        ImportError: pyarrow or fsspec is missing (extra ``data``).

    Warns:
        DamagedTarWarning: a part of a tar was skipped, files follow behind its end mark, or the end mark is missing.
    """
    storage = Storage(root)
    tars, done = storage.shards(), storage.indices()
    if not tars:
        raise ValueError(f"root: expected tar shards in it (images/*.tar or *.tar), got {quoted(root)}, which has none")
    report = ShardReport(finished_before=len(tars.keys() & done.keys()))
    failed: dict[str, str] = {}
    missing = sorted(tars.keys() - done.keys())
    if missing:
        storage.check_writable("index")
    for number, name in enumerate(missing):
        progress(number, len(missing))
        try:
            rows = _index(storage, tars[name], name, report)
        except (ImportError, MemoryError, FullStorageError):
            raise
        except Exception as error:  # of this tar alone: readers, file systems and Arrow raise errors of many types
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            failed[tars[name]] = " ".join(reason.split())
            continue
        report.shards += 1
        report.images += rows
    progress(len(missing), len(missing))
    if failed:
        details = "".join(f"\n  {shown(path)}: {reason}" for path, reason in sorted(failed.items()))
        message = f"{len(failed)} of {len(tars)} tars cannot be read; replace or remove them:{details}"
        raise DamagedTarsError(message, report)
    return report


def _index(storage: Storage, path: str, name: str, report: ShardReport) -> int:
    """Write the index of one tar; count what was skipped; return the number of images."""
    findings = Findings()
    with storage.filesystem.open(path, "rb") as file:
        rows, skipped = _read_rows(file, findings)
    try:
        with storage.replace(f"{storage.root}/index/{name}.parquet") as file:
            write_rows(rows, file)
    except OSError as error:
        reason = f"its index cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise FullStorageError(f"{shown(path)}: {reason}; tars before it have their index") from error
        raise OSError(reason) from error
    report.skipped += skipped
    report.skipped += Counter({DAMAGED: len(findings.damaged)})
    if text := str(findings):
        warnings.warn(f"{shown(path)}: {text}", DamagedTarWarning, stacklevel=3)
    return len(rows)


def _read_rows(file: IO[bytes], findings: Findings) -> tuple[list[Row], Counter[str]]:
    """The rows of one tar, and counts of its skipped files by reason."""
    rows: dict[str, Row] = {}
    urls: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for member in members(file, findings):
        folder, _, name = escaped(member.name).rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
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
                rows[key] = make_row(key, member.offset_data, content, read_header(content, quoted(member.name)))
            except UnreadableImageError:
                skipped["no image by its content"] += 1
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
        raise EOFError(f"it ends within {quoted(member.name)}")
    return content


def _url(key: str, content: bytes) -> dict[str, str]:
    """``{key: url}`` from the metadata of an image; empty if they have no url."""
    try:
        url = json.loads(content)["url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {key: url.encode("utf-8", "backslashreplace").decode()} if isinstance(url, str) else {}
