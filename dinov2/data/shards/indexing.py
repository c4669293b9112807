"""Indexing tars that have no index, for example those of WebDataset, img2dataset or plain ``tar``."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import IO

from dinov2.data.decoding import UnreadableImageError, holds_image, read_header
from dinov2.data.files import escaped, quoted, reason_of_place, shown
from dinov2.data.formats import BEGINNING, ending, image_extensions, is_other, label_of, may_be_image
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

    The index has every image. A file is one by the ending of its name, or else by its content. Its key is its name
    without the ending, or its whole name if another image has that key. An image has the ``url`` in the ``.json`` file
    with its name, or with its name up to the first dot. Other files are counted by ending. If several files have
    one name, the last counts, as in every program that unpacks tars. Only plain files are read: links and devices are
    skipped, and nothing is unpacked. So are hidden files and folders of systems such as ``__MACOSX``. A file whose
    header in the tar is damaged is skipped, counted and warned of, if other files follow. In names that are not UTF-8,
    other bytes become ``\xNN`` (see :func:`~dinov2.data.escaped`). Shards with an index are skipped, so a second call
    finishes an interrupted one. To index a tar that has changed, delete its index first.

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
    report.shared_names += _sharing(row["key"] for row in rows)
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
    rows: dict[str, Row] = {}  # by the whole name of the image
    urls: dict[str, str] = {}  # by the name of their file without .json
    skipped: Counter[str] = Counter()
    for member in members(file, findings):
        if member.isdir():
            continue
        name = escaped(member.name).removeprefix("./")
        if not member.isreg() or member.issparse():
            skipped["no plain file"] += 1
        elif member.size > MAX_SIZE:
            skipped["larger than 2 GiB"] += 1
        elif reason := reason_of_place(name):
            skipped[reason] += 1
        elif ending(name) == ".json":
            urls |= _url(name[: -len(".json")], _content(file, member))
        elif (label := _label_of_other(file, member, name)) is not None:
            skipped[label] += 1
        else:
            content = _content(file, member)
            try:
                row = make_row(name, member.offset_data, content, read_header(content, quoted(member.name)))
            except UnreadableImageError:
                skipped["no image by its content"] += 1
                continue
            if rows.pop(name, None):
                skipped["replaced by a later file of its name"] += 1
            rows[name] = row
    for name, key in keys_of(rows).items():
        rows[name] |= {"key": key, "url": urls.get(_stem(name)) or urls.get(_up_to_a_dot(name))}
    return list(rows.values()), skipped


def _label_of_other(file: IO[bytes], member: tarfile.TarInfo, name: str) -> str | None:
    """What a file counts as that is no image; None if it could be one."""
    if ending(name) in image_extensions():
        return None
    if is_other(name):
        return label_of(name)
    beginning = _content(file, member, BEGINNING)
    if may_be_image(beginning) and holds_image(io.BytesIO(_content(file, member))):
        return None
    return label_of(name, beginning)


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """A key for each of several different names of images: the name without its ending, or all of it if another image
    has that key."""
    keys, taken = dict[str, str](), set[str]()
    for name in names:
        numbered = (f"{name}~{number}" for number in itertools.count(2))
        key = next(key for key in itertools.chain((_stem(name), name), numbered) if key not in taken)
        taken.add(key)
        keys[name] = key
    return keys


def _stem(name: str) -> str:
    """A name without the ending of an image."""
    return name[: -len(ending(name))] if ending(name) in image_extensions() else name


def _up_to_a_dot(name: str) -> str:
    """A name up to its first dot, which WebDataset takes for the key of all files of a sample."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _sharing(keys: Iterable[str]) -> int:
    """The number of images that WebDataset would take for one sample with another image."""
    counts = Counter(map(_up_to_a_dot, keys))
    return sum(count for count in counts.values() if count > 1)


def _content(file: IO[bytes], member: tarfile.TarInfo, most: int = MAX_SIZE) -> bytes:
    """The bytes of a plain file in a tar, or its first ones."""
    position, size = file.tell(), min(member.size, most)
    file.seek(member.offset_data)
    content = file.read(size)
    file.seek(position)
    if len(content) < size:
        raise EOFError(f"it ends within {quoted(member.name)}")
    return content


def _url(key: str, content: bytes) -> dict[str, str]:
    """``{key: url}`` from the metadata of an image; empty if they have no url."""
    try:
        url = json.loads(content)["url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {key: url.encode("utf-8", "backslashreplace").decode()} if isinstance(url, str) else {}
