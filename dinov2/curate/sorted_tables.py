"""Tables sorted by a key of 64 bits. They bring together the rows of many shards that have the same key.

Each task sorts its own shard. Each task of the next step reads one range of keys from all shards. So no task holds all
rows in memory, and no task reads all rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.curate.steps import Output
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

KEY = "key"
ROWS = 4096  # rows of a row group, which is read as a whole


def key_of_text(text: str) -> int:
    """The first 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def key_ranges(count: int) -> list[tuple[int, int]]:
    """The first and last key of ``count`` ranges, which have equal width and cover all keys."""
    return [((number << 64) // count, ((number + 1 << 64) // count) - 1) for number in range(count)]


def text_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """Make a table of pyarrow from rows of text. Single surrogates, which are no Unicode, become question marks."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    return arrow.table(
        {name: arrow.array([_clean(row[place]) for row in rows], arrow.string()) for place, name in enumerate(names)}
    )


def write_sorted(output: Output, keys: Sequence[int], table: Any) -> None:
    """Write a table as ``SHARD.parquet``, with the ascending key of each row as its last column."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    table = table.append_column(KEY, arrow.array(np.asarray(keys, dtype=np.uint64)))
    with output.replace(".parquet") as file:
        parquet.write_table(table, file, row_group_size=ROWS)


def read_range(folder: str, shard: str, first: int, last: int) -> Any:
    """Read the rows of ``FOLDER/SHARD.parquet`` whose keys are in a range, in order and without their keys."""
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    storage = Storage(folder)
    with storage.filesystem.open(f"{storage.root}/{shard}.parquet", "rb") as file:
        opened = parquet.ParquetFile(file)
        place = opened.schema_arrow.get_field_index(KEY)
        groups = [
            number
            for number in range(opened.num_row_groups)
            if _overlaps(opened.metadata.row_group(number).column(place).statistics, first, last)
        ]
        table = opened.read_row_groups(groups, use_threads=False)
    keys: npt.NDArray[np.uint64] = table[KEY].to_numpy()
    start, stop = np.searchsorted(keys, np.uint64(first), "left"), np.searchsorted(keys, np.uint64(last), "right")
    return table.drop_columns([KEY]).slice(int(start), int(stop - start))


def _overlaps(statistics: Any, first: int, last: int) -> bool:
    return statistics is not None and bool(statistics.min <= last and statistics.max >= first)  # None: no rows


def _clean(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
