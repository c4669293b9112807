"""The index of a shard: a Parquet file with one row for each image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import IO, Any

from dinov2.data.decoding import ImageHeader
from dinov2_kernels._extras import require

# Name and Arrow type; other columns may follow.
COLUMNS = {
    "key": "string",  # name of the image, without an extension
    "offset": "int64",  # of the image's bytes in the tar
    "size": "int32",  # their number
    "width": "int32",  # in pixels, as stored
    "height": "int32",
    "url": "string",  # where it comes from, if known
    "sha256": "string",  # of the bytes, 64 hexadecimal digits
}
MAX_SIZE = 2**31 - 1

Row = dict[str, Any]


def make_row(key: str, offset: int, content: bytes, header: ImageHeader) -> Row:
    """What the bytes of an image say themselves; ``url`` and other columns are for the caller to add."""
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
    """Write an index; columns beyond :data:`COLUMNS` take the type of their values, absent ones are null."""
    parquet = require("pyarrow.parquet", extra="data", purpose="the index of tar shards")
    arrow = require("pyarrow", extra="data", purpose="the index of tar shards")
    types = {name: arrow.type_for_alias(alias) for name, alias in COLUMNS.items()}
    names = dict.fromkeys(COLUMNS) | dict.fromkeys(name for row in rows for name in row)
    columns = {name: arrow.array([row.get(name) for row in rows], types.get(name)) for name in names}
    parquet.write_table(arrow.table(columns), file)
