"""Tables sorted by a key of 64 bits: how rows of many shards that belong together meet, with neither all in memory nor
all read by everyone. Each shard is sorted by its own task; a task of the next step reads its range of keys of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.curate.steps import Output
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

KEY = "key"
ROWS = 4096  # of a group, which is read as a whole


def key_of_text(text: str) -> int:
    """The first 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def key_ranges(count: int) -> list[tuple[int, int]]:
    """The first and last key of each of so many ranges, which are of equal width and cover all keys."""
    return [((number << 64) // count, ((number + 1 << 64) // count) - 1) for number in range(count)]


def text_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A table of pyarrow of rows of text; what is no Unicode in them, single surrogates, becomes a question mark."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    return arrow.table(
        {name: arrow.array([_clean(row[place]) for row in rows], arrow.string()) for place, name in enumerate(names)}
    )


def write_sorted(output: Output, keys: Sequence[int], table: Any) -> None:
    """Write ``SHARD.parquet``: a table with a key for each row, in ascending order, as its last column."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    table = table.append_column(KEY, arrow.array(np.asarray(keys, dtype=np.uint64)))
    with output.replace(".parquet") as file:
        parquet.write_table(table, file, row_group_size=ROWS)


def read_range(folder: str, shard: str, first: int, last: int) -> Any:
    """The rows of ``FOLDER/SHARD.parquet`` whose keys are in a range, in their order; without their keys."""
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
