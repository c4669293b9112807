"""Writing tar shards: the tar, an index row for each image, and a report of written and skipped files."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from dinov2.data.decoding import ImageHeader, UnreadableImageError, read_header
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

# Columns of an index: name and Arrow type. Other columns may follow.
COLUMNS = {
    "key": "string",  # name of the image, without an extension
    "offset": "int64",  # place of the image's first byte in the tar
    "size": "int32",  # number of the image's bytes
    "width": "int32",  # in pixels, as stored
    "height": "int32",
    "url": "string",  # origin of the image, if known
    "sha256": "string",  # digest of the image's bytes, 64 hexadecimal digits
}
MAX_SIZE = 2**31 - 1
NO_IMAGE, TOO_LARGE = "no image by its content", "larger than 2 GiB"

Row = dict[str, Any]
KEY = re.compile(r"[\w-]+", re.ASCII)
COMPUTED = COLUMNS.keys() - {"url"}


@dataclass
class ShardReport:
    """Counts of files.

    Attributes:
        shards: number of shards that were written or indexed.
        images: number of rows in their indices.
        skipped: number of other files, by reason.
        finished_before: number of shards that already had an index.
        shared_names: number of indexed images whose names are equal up to the first dot. WebDataset would take them for
            parts of one sample, such as an image and its mask; here each is an image.
    """

    shards: int = 0
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    finished_before: int = 0
    shared_names: int = 0

    def __str__(self) -> str:
        lines = [f"{self.images:,} images in {self.shards:,} shards"]
        lines += [f"  skipped {number:,}: {reason}" for reason, number in self.skipped.most_common()]
        if self.shared_names:
            lines.append(f"  {self.shared_names:,} images have names that are equal up to the first dot; each counts")
        if self.finished_before:
            lines.append(f"  {self.finished_before:,} more shards had an index already")
        return "\n".join(lines)


def make_row(key: str, offset: int, content: bytes, header: ImageHeader) -> Row:
    """An index row with the columns that an image's bytes decide. The caller adds ``url`` and other columns."""
    return {
        "key": key,
        "offset": offset,
        "size": len(content),
        "width": header.width,
        "height": header.height,
        "url": None,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def write_rows(rows: Sequence[Row], file: IO[bytes]) -> None:
    """Write an index. Columns that are not in :data:`COLUMNS` get the type of their values; missing values are null."""
    parquet = require("pyarrow.parquet", extra="data", purpose="the index of tar shards")
    arrow = require("pyarrow", extra="data", purpose="the index of tar shards")
    types = {name: arrow.type_for_alias(alias) for name, alias in COLUMNS.items()}
    names = dict.fromkeys(COLUMNS) | dict.fromkeys(name for row in rows for name in row)
    columns = {name: arrow.array([row.get(name) for row in rows], types.get(name)) for name in names}
    parquet.write_table(arrow.table(columns), file)


@dataclass(frozen=True)
class ShardImage:
    """An image to write into a shard.

    Attributes:
        key: name of letters, digits, ``_`` and ``-``; unique in its shard.
        content: bytes of the image file; they are stored unchanged.
        columns: more columns of its index row: ``url`` and any other.
    """

    key: str
    content: bytes
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not KEY.fullmatch(self.key):
            raise ValueError(f"key: expected letters, digits, '_' and '-', got {self.key!r}")
        if reserved := COMPUTED & self.columns.keys():
            raise ValueError(
                f"columns: expected none of {', '.join(sorted(COMPUTED))}, which the image's bytes decide, got"
                f" {', '.join(sorted(reserved))}"
            )


Skipped = Callable[[ShardImage, str, str], None]
"""Is told about an image that is in no shard: the image, the reason, and a remark."""


def write_shards(
    images: Iterable[ShardImage], root: str | os.PathLike[str], *, shard_size: int = 10_000
) -> ShardReport:
    """Write images to ``root/images/00000.tar``, ``00001.tar`` and so on, with their indices.

    Args:
        images: images to write; one shard at a time is held in memory.
        root: a folder without shards, which is created if necessary, or a URL of fsspec.
        shard_size: number of images in a shard.

    Returns:
        Counts of written images, and of skipped files that are not images.

    Raises:
        ValueError: ``root`` holds shards already, or two images of a shard have the same key.
        ImportError: pyarrow or fsspec is missing (extra ``data``).
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: expected at least 1, got {shard_size}")
    if Storage(root).shards():
        raise ValueError(f"root: expected a folder or URL without shards, got {os.fspath(root)!r}, which has some")
    report, remaining = ShardReport(), iter(images)
    for number in itertools.count():
        if not (shard := list(itertools.islice(remaining, shard_size))):
            return report
        of_shard = write_shard(shard, root, number)
        report.shards += of_shard.shards
        report.images += of_shard.images
        report.skipped += of_shard.skipped
    raise AssertionError


def write_shard(
    images: Iterable[ShardImage], root: str | os.PathLike[str], number: int, skipped: Skipped = lambda *_: None
) -> ShardReport:
    """Write one shard; it replaces an earlier shard of the same number. Several processes may write one shard each.

    Tar and index are written under other names and then renamed, the index last. So a shard with an index is complete.

    Args:
        images: images to write; one at a time is held in memory.
        root: folder of the shards, or a URL of fsspec.
        number: number of the shard.
        skipped: called with each image that is skipped, the reason, and a remark, such as the decoder's words.

    Raises:
        ValueError: two images have the same key.
    """
    storage, report = Storage(root), ShardReport(shards=1)
    rows: dict[str, Row] = {}
    with (
        storage.replace(f"{storage.root}/images/{number:05d}.tar") as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for image in images:
            if image.key in rows:
                raise ValueError(f"key: expected a key of its own for each image of a shard, got {image.key!r} twice")
            try:
                header = read_header(image.content, image.key)
            except UnreadableImageError as error:
                report.skipped[NO_IMAGE] += 1
                skipped(image, NO_IMAGE, error.words)
                continue
            if len(image.content) > MAX_SIZE:
                report.skipped[TOO_LARGE] += 1
                skipped(image, TOO_LARGE, f"{len(image.content):,} bytes")
                continue
            member = tarfile.TarInfo(image.key + header.extension)
            member.size = len(image.content)
            offset = file.tell() + tarfile.BLOCKSIZE  # a header of this format is one block
            tar.addfile(member, io.BytesIO(image.content))
            rows[image.key] = make_row(image.key, offset, image.content, header) | dict(image.columns)
    with storage.replace(f"{storage.root}/index/{number:05d}.parquet") as file:
        write_rows(list(rows.values()), file)
    report.images = len(rows)
    return report
