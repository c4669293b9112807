"""Which files of a folder are images, and why all others are left out."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from dinov2.data.decoding import holds_image
from dinov2.data.files import quoted, reason_of_place
from dinov2.data.formats import BEGINNING, ending, image_extensions, is_other, label_of, may_be_image
from dinov2.data.outputs import final_set, of_outputs
from dinov2.data.shards.storage import Storage, is_local
from dinov2.extras import require

CLOSED = "that cannot be opened"
_AT_ONCE = 1000  # beginnings of remote files that are asked for together
_LABELS = 8  # in a line of text


class SourceWarning(UserWarning):
    """A source of images has files that are not read, or others than its name says are read."""


@dataclass(frozen=True)
class Contents:
    """The files of a folder.

    Attributes:
        images: sorted paths of the images, relative to the folder.
        left_out: why every other file is left out, by path: its ending (``.txt``), perhaps with the package that would
            read it, or other words (``hidden``).
    """

    images: list[str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """What is left out, in a line, such as ``12 files: 8 .heic, 3 .txt, 1 .mp4``; empty if nothing is."""
        return summary(Counter(self.left_out.values()))


def summary(counts: Mapping[str, int]) -> str:
    """Counts of files by label in a line: labels with a remark first, then by size; empty if there is none."""
    ordered = sorted(counts.items(), key=lambda item: ("(" not in item[0], -item[1], item[0]))
    number = sum(counts.values())
    parts = [f"{count:,} {label}" for label, count in ordered[:_LABELS]]
    if len(ordered) > _LABELS:
        parts.append(f"{sum(count for _, count in ordered[_LABELS:]):,} others")
    return f"{number:,} {'file' if number == 1 else 'files'}: {', '.join(parts)}" if number else ""


def warn_of_left_out(root: str, contents: Contents) -> None:
    """Count what is left out under a root, whose name is in quotes already."""
    if text := str(contents):
        _warn(f"left out {text} under {root}")


def images_among(paths: Collection[str], storage: Storage, *, by_content: bool = True) -> Contents:
    """Tell images from other files.

    The ending of a name decides for images, texts, tables, archives and raw data of cameras. All other files are images
    if they begin like one and their header can be read. Hidden files and folders, folders of systems, and outputs of
    this library are left out.

    Args:
        paths: all files under a root, relative to it, in sorted order.
        storage: the root.
        by_content: open the files whose names do not tell; without it, they are left out.
    """
    left_out = of_outputs(storage, paths)
    named, unknown, extensions = list[str](), list[str](), image_extensions()
    for path in paths:
        if path in left_out:
            continue
        if reason := reason_of_place(path):
            left_out[path] = reason
        elif ending(path) in extensions:
            named.append(path)
        elif is_other(path) or not by_content:
            left_out[path] = label_of(path)
        else:
            unknown.append(path)
    found = list[str]()
    for path, beginning in _beginnings(storage, unknown):
        if beginning is None:
            left_out[path] = CLOSED
        elif may_be_image(beginning) and _holds_image(storage, path):
            found.append(path)
        else:
            left_out[path] = label_of(path, beginning)
    return Contents(sorted(named + found) if found else named, left_out)


def is_of_tars(storage: Storage, root: str, paths: Collection[str]) -> bool:
    """Whether a folder or URL is a place of tar shards rather than of image files.

    It is one if it has tars or indices, and no images beside them. With images beside them, the tars are read if all of
    them have an index, and if they hold more images than lie beside. Otherwise the images are read. Tars count if they
    are in the folder ``images``, or in the root itself if that folder has none.

    Args:
        storage: the root.
        root: its name for messages.
        paths: all files under it.

    Warns:
        SourceWarning: images or tars are left out.
    """
    tars, indices = storage.shards(), storage.indices()
    if not (tars or indices):
        return False
    contents = images_among(paths, storage, by_content=False)
    beside = contents.images
    known = {path.removeprefix(f"{storage.root}/") for path in tars.values()}
    if others := [path for path, label in contents.left_out.items() if label == ".tar" and path not in known]:
        _warn(
            f"left out {_tars(others)} under {quoted(root)}: tars are read from one folder, images or the root itself"
        )
    if not (tars and beside):
        return not beside
    if tars.keys() <= indices.keys() and _rows(storage, indices) > len(beside):
        left_out = summary(Counter(map(ending, beside)))
        _warn(f"left out {left_out} under {quoted(root)}, because the tars there hold more images; they are read")
        return True
    _warn(
        f"left out {_tars(known)} under {quoted(root)}, because images lie beside; to read a tar, put it into a"
        " folder of its own and index it: dinov2 index FOLDER"
    )
    return False


def _tars(paths: Collection[str]) -> str:
    names = sorted(path.rpartition("/")[2] for path in paths)
    listed = ", ".join(map(quoted, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'tar' if len(names) == 1 else 'tars'} ({listed})"


def _rows(storage: Storage, indices: Mapping[str, str]) -> float:
    """The number of images in tars, by their indices. If it cannot be read, there are many, and their reader says why
    not."""
    parquet, rows = require("pyarrow.parquet", extra="data", purpose="tar shards"), 0
    for path in indices.values():
        try:
            with storage.filesystem.open(path, "rb") as file:
                rows += parquet.ParquetFile(file).metadata.num_rows
        except Exception:  # file systems and Arrow raise errors of many types
            return math.inf
    return rows


def located(root: str, argument: str) -> str:
    """The root itself, or the final set if it is a curation; ``argument`` is its name in errors.

    Raises:
        ValueError: the curation has not ended, or the protocol of a URL is unknown.

    Warns:
        SourceWarning: the final set is read.
    """
    try:
        found = final_set(root)
    except ValueError as error:
        raise ValueError(f"{argument}: {str(error).removeprefix('root: ')}") from None
    if found is None:
        return root
    _warn(f"{quoted(root)} is a curation; its final set is read: {quoted(found)}")
    return found


def _warn(text: str) -> None:
    warnings.warn(text, SourceWarning, stacklevel=4)


def _beginnings(storage: Storage, paths: list[str]) -> Iterator[tuple[str, bytes | None]]:
    """The first bytes of files, by path; None for those that cannot be read or are no plain files."""
    if is_local(storage.filesystem):
        for path in paths:
            yield path, _local_beginning(os.path.join(storage.root, path))
        return
    for start in range(0, len(paths), _AT_ONCE):
        some = paths[start : start + _AT_ONCE]
        places = [f"{storage.root}/{path}" for path in some]
        parts: list[Any] = storage.filesystem.cat_ranges(places, 0, BEGINNING, on_error="return")
        yield from ((path, part if isinstance(part, bytes) else None) for path, part in zip(some, parts, strict=True))


def _local_beginning(path: str) -> bytes | None:
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            with open(path, "rb") as file:
                return file.read(BEGINNING)
    return None


def _holds_image(storage: Storage, path: str) -> bool:
    try:
        with storage.filesystem.open(f"{storage.root}/{path}", "rb") as file:
            return holds_image(cast(BinaryIO, file))
    except OSError:
        return False
