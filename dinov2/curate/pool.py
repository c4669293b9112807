"""Pools: images in shards, and columns that stages add to them, such as features and decisions."""

from __future__ import annotations

import dataclasses
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.steps import Counts, Output, digest
from dinov2.data.shards.storage import RangeReader, Storage
from dinov2.extras import require

SKIPPED = ".skipped"
"""End of the name of a table of files that are in no shard."""


@dataclass(frozen=True)
class Pool:
    """Images that a stage takes or gives: shards that never change, and decisions about which rows are still in.

    Row i of a shard is row i of its index and of every column. Columns are in the folder of the step that made them, in
    files with the shard's name: tables ``SHARD.parquet``, arrays ``SHARD.npy``.

    Attributes:
        images: folder or URL of the tars (``images/*.tar`` or ``*.tar``) and of their ``index/*.parquet``.
        decisions: folders of tables with a column ``keep`` (bool) and a column ``reason`` (text, null where kept).
        features: folder of arrays [n, D], float16 of unit length; None before the pool is embedded. Rows that were out
            at that time, or could not be embedded, are NaN.
        small: folder of the pieces of screening, with small images of large files; None before the pool is screened.
        view_side: pixels of the longer side to which screening decoded images; None before the pool is screened.
        sketches: folder of the sketches of images, by which two of them are compared; None before they are made.
        version: a digest of tars that are not this curation's own, so that somebody may replace them; else empty.
    """

    images: str
    decisions: tuple[str, ...] = ()
    features: str | None = None
    small: str | None = None
    view_side: int | None = None
    sketches: str | None = None
    version: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """A step that reads the pool has these inputs."""
        return (self.images, *filter(None, [self.version]), *self.decisions)

    def stamp(self, shard: str) -> str:
        """A text that changes when the tar of a shard does."""
        storage = Storage(self.images)
        return storage.stamp(storage.shards()[shard])

    def after(self, decisions: str) -> Pool:
        """This pool without the rows that a step decided to drop."""
        return dataclasses.replace(self, decisions=(*self.decisions, decisions))

    def shards(self) -> list[str]:
        """Names of the shards, sorted."""
        return list(Storage(self.images).indices())

    def fingerprint(self) -> str:
        """A digest of the shards' names and the sizes of their indices, for steps that depend on all shards."""
        storage = Storage(self.images)
        sizes = {name: storage.filesystem.size(path) for name, path in storage.indices().items()}
        return digest([sizes, [os.path.basename(folder) for folder in self.decisions]])

    def index(self, shard: str, columns: Sequence[str] | None = None) -> Any:
        """The index of a shard, a table of pyarrow: key, offset, size, width, height, url, sha256 and other columns.

        If ``columns`` names a missing column, that column is null.
        """
        table = read_table(f"{self.images}/index", shard)
        if columns is None:
            return table
        arrow = require("pyarrow", extra="curate", purpose="curation")
        nothing = arrow.nulls(len(table), arrow.string())
        return arrow.table({name: table[name] if name in table.column_names else nothing for name in columns})

    def kept(self, shard: str) -> npt.NDArray[np.bool_]:
        """Which rows [n] are still in."""
        if not self.decisions:
            return np.ones(len(self.index(shard, ["size"])), dtype=bool)
        keeps = [read_table(folder, shard, ["keep"])["keep"].to_numpy() for folder in self.decisions]
        alive: npt.NDArray[np.bool_] = np.logical_and.reduce(keeps)
        return alive

    def read_features(self, shard: str) -> npt.NDArray[np.float16]:
        """Features [n, D] of a shard; memory-mapped on a local disk.

        Raises:
            ValueError: the pool has no features yet.
        """
        if self.features is None:
            raise ValueError("pool: expected features, got none: embed it first")
        return read_array(self.features, shard)

    def open_images(self, shard: str) -> ShardBytes:
        """Open the files of a shard's images, by row."""
        return ShardBytes(self.images, shard)


class ShardBytes:
    """The stored bytes of each image of a shard: ``files[row]``."""

    def __init__(self, images: str, shard: str) -> None:
        storage = Storage(images)
        self._path = storage.shards()[shard]
        index = read_table(f"{images}/index", shard, ["offset", "size"])
        self._offsets = index["offset"].to_numpy()
        self._sizes = index["size"].to_numpy()
        self._read = RangeReader(storage.filesystem)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, row: int) -> bytes:
        """The file of a row; shorter if the tar is cut off."""
        return self._read(self._path, int(self._offsets[row]), int(self._sizes[row]))


def read_table(folder: str, shard: str, columns: Sequence[str] | None = None) -> Any:
    """Read ``FOLDER/SHARD.parquet`` as a table of pyarrow, with all columns or some."""
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    storage = Storage(folder)
    with storage.filesystem.open(f"{storage.root}/{shard}.parquet", "rb") as file:
        return parquet.read_table(file, columns=None if columns is None else list(columns), use_threads=False)


def column_names(folder: str, shard: str) -> list[str]:
    """The names of the columns of ``FOLDER/SHARD.parquet``."""
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    storage = Storage(folder)
    with storage.filesystem.open(f"{storage.root}/{shard}.parquet", "rb") as file:
        return list(parquet.read_schema(file).names)


def read_array(folder: str, shard: str) -> npt.NDArray[Any]:
    """Read ``FOLDER/SHARD.npy``; it is memory-mapped on a local disk."""
    storage = Storage(folder)
    path = f"{storage.root}/{shard}.npy"
    if RangeReader(storage.filesystem).is_local:
        mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    loaded: npt.NDArray[Any] = np.load(io.BytesIO(storage.filesystem.cat_file(path)), allow_pickle=False)
    return loaded


class Skipped(NamedTuple):
    """A file or link that is in no shard.

    Attributes:
        name: path of the file or URL of the link, as a table can hold it.
        reason: one of a few texts that are counted.
        remark: more words about it, such as the decoder's or the system's.
    """

    name: str
    reason: str
    remark: str


def write_skipped(output: Output, skipped: Sequence[Skipped]) -> None:
    """Write ``SHARD.skipped.parquet``, which :func:`read_skipped` reads."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    columns = {
        name: arrow.array([_text(entry[place]) for entry in skipped], arrow.string())
        for place, name in enumerate(Skipped._fields)
    }
    Output(output.folder, f"{output.shard}{SKIPPED}").write_table(columns)


def read_skipped(folder: str, shard: str) -> Any:
    """The table of a shard's skipped files, with the columns of :class:`Skipped`."""
    return read_table(folder, f"{shard}{SKIPPED}")


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def write_decisions(
    output: Output,
    reasons: Sequence[str | None],
    before: npt.NDArray[np.bool_],
    columns: Mapping[str, Any] | None = None,
    figures: Mapping[str, int] | None = None,
) -> Counts:
    """Write ``keep`` and ``reason`` of every row, and other columns.

    Args:
        output: where the task writes.
        reasons: why each row is dropped, None if it is kept, [n]. Entries of rows that were out before are ignored.
        before: which rows were still in, [n]; the others get ``keep`` false and no reason.
        columns: other columns by name, arrays or lists [n].
        figures: other numbers for the counts.

    Returns:
        Counts of the rows that were still in.
    """
    arrow = require("pyarrow", extra="curate", purpose="curation")
    own = [reason if was_in else None for reason, was_in in zip(reasons, before.tolist(), strict=True)]
    keep = [was_in and reason is None for reason, was_in in zip(own, before.tolist(), strict=True)]
    table = {"keep": arrow.array(keep, arrow.bool_()), "reason": arrow.array(own, arrow.string())}
    output.write_table(table | dict(columns or {}))
    dropped = Counter(reason for reason in own if reason is not None)
    return Counts(int(before.sum()), sum(keep), dict(sorted(dropped.items())), dict(figures or {}))
