"""Tar shards as a map-style dataset: each image takes one read at a known place of a known file."""

from __future__ import annotations

import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image
from dinov2.data.files import escaped, quoted, shown
from dinov2.data.shards.storage import RangeReader, Storage
from dinov2.extras import require

INDEX_READERS = 16  # threads, because index files are small, and shared disks and object stores mostly make us wait

REMOTE_READS = 16  # requests at once in each worker; a request takes about 50 ms

IndexArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]


class TarShards:
    """The images of all shards under a root, in the order of the shards' names and of the rows in their indices.

    A map-style dataset: ``len(shards)``, ``shards[i]`` -> uint8 RGB ``[H, W, 3]``, or as
    :func:`~dinov2.data.read_image` says for other numbers of channels. The tars are ``root/images/*.tar`` (or
    ``root/*.tar``). Their indices are ``root/index/*.parquet`` with the same names and at least the columns offset and
    size. Tars are not parsed, and nothing in them is followed or unpacked: the index says which bytes to read. The
    dataset takes 12 bytes of memory for each image, and forked workers share them.

    Args:
        root: a folder, or a URL of fsspec.
        channels: number of channels of every image.

    Raises:
        ValueError: there is no shard, a shard is missing or has no index, or an index is damaged; the message names it.
        ImportError: pyarrow or fsspec is missing (extra ``data``).
    """

    def __init__(self, root: str | os.PathLike[str], channels: int = 3) -> None:
        self.root = os.fspath(root)
        self.channels = channels
        storage = Storage(root)
        tars, indices = storage.shards(), storage.indices()
        _check_pairs(self.root, tars, indices)
        self.paths = [tars[name] for name in indices]
        with ThreadPoolExecutor(INDEX_READERS) as pool:
            arrays = list(pool.map(lambda path: _read_index(storage.filesystem, path), indices.values()))
        self._offsets = np.concatenate([offsets for offsets, _ in arrays])  # [N] int64
        self._sizes = np.concatenate([sizes for _, sizes in arrays])  # [N] int32
        self._ends = np.cumsum([len(sizes) for _, sizes in arrays])  # [shards] int64: end of each shard
        self._read = RangeReader(storage.filesystem)
        self.concurrent_reads = 1 if self._read.is_local else REMOTE_READS

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> Pixels:
        """Image ``index``, ``[H, W, channels]``.

        Raises:
            UnreadableImageError: the image cannot be read or decoded; the message names its shard and its place there.
        """
        content, name = self._content(range(len(self))[index])
        return decode_image(content, name, self.channels)

    def read_bytes(self, index: int) -> bytes:
        """The stored file of image ``index``; errors are those of ``shards[index]``."""
        return self._content(range(len(self))[index])[0]

    def names(self) -> list[str]:
        """``SHARD/KEY`` of every image, or ``SHARD/OFFSET`` if an index has no keys; reads the indices again."""
        storage = Storage(self.root)
        return [
            f"{escaped(shard)}/{name}"
            for shard, path in storage.indices().items()
            for name in _read_names(storage.filesystem, path)
        ]

    def _content(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image and a name for it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        name = f"of {size} bytes at {offset} in {quoted(self.paths[shard])}"
        try:
            content = self._read(self.paths[shard], offset, size)
        except Exception as error:  # file systems raise errors of many types
            raise UnreadableImageError(f"cannot read image {name}: {error}") from error
        if len(content) != size:
            raise UnreadableImageError(f"cannot read image {name}: the shard ends after {len(content)} of them")
        return content, name


def _check_pairs(root: str, tars: dict[str, str], indices: dict[str, str]) -> None:
    """Check that there is a shard, that each shard has an index, and that each index has a shard."""
    if not tars and not indices:
        raise ValueError(f"root: expected tar shards in it (images/*.tar or *.tar), got {quoted(root)}, which has none")
    if missing := indices.keys() - tars.keys():
        raise ValueError(
            f"root: expected a tar for each index, got {quoted(root)}, which lacks {len(missing)} of {len(indices)}"
            f" tars: {_some(missing, '.tar')}"
        )
    if unindexed := tars.keys() - indices.keys():
        raise ValueError(
            f"root: expected an index for each tar, got {quoted(root)}, which lacks the indices of {len(unindexed)} of"
            f" {len(tars)} tars: {_some(unindexed, '.tar')}; write them with: dinov2 index {shlex.quote(root)}"
        )


def _some(names: set[str], suffix: str) -> str:
    """The first few names."""
    listed = ", ".join(shown(name + suffix) for name in sorted(names)[:3])
    return listed if len(names) <= 3 else f"{listed}, ..."


def _read_names(filesystem: Any, path: str) -> list[Any]:
    parquet = require("pyarrow.parquet", extra="data", purpose="TarShards")
    with filesystem.open(path, "rb") as file:
        table = parquet.ParquetFile(file)
        column = "key" if "key" in table.schema_arrow.names else "offset"
        names: list[Any] = table.read([column])[column].to_pylist()
    return names


def _read_index(filesystem: Any, path: str) -> IndexArrays:
    """Offsets and sizes of one shard's images."""
    parquet = require("pyarrow.parquet", extra="data", purpose="TarShards")
    try:
        with filesystem.open(path, "rb") as file:
            table = parquet.read_table(file, columns=["offset", "size"], use_threads=False)
        return table["offset"].to_numpy().astype(np.int64), table["size"].to_numpy().astype(np.int32)
    except Exception as error:
        raise ValueError(f"index {quoted(path)} cannot be read; write it again: {error}") from error
