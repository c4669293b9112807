"""Storage of shards: a folder on a disk, or any URL that fsspec supports (``s3://``, ``memory://``, ...)."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from dinov2_kernels._extras import require

MAX_OPEN_FILES = 512  # half of Linux's default limit for a process


class Storage:
    """A folder of shards, by path or URL.

    Attributes:
        root: the path, or the URL without its protocol.
        filesystem: fsspec's file system object of this process.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        fsspec = require("fsspec", extra="data", purpose="reading tar shards")
        self.filesystem, self.root = fsspec.core.url_to_fs(os.fspath(root))

    def files(self, folder: str, suffix: str) -> dict[str, str]:
        """Paths of the files ``folder/*suffix`` by their names without the suffix, in sorted order."""
        path = f"{self.root}/{folder}".rstrip("/")
        try:
            names = self.filesystem.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {name.rpartition("/")[2]: name for name in names}
        return {
            name.removesuffix(suffix): found[name]
            for name in sorted(found)
            if name.endswith(suffix) and not name.startswith(".")
        }

    def shards(self) -> dict[str, str]:
        """The tars by name, in the folder ``images``, or in the root itself if that folder has none."""
        return self.files("images", ".tar") or self.files("", ".tar")

    def indices(self) -> dict[str, str]:
        """The index files by the name of their shard."""
        return self.files("index", ".parquet")

    @contextmanager
    def replace(self, path: str) -> Iterator[IO[bytes]]:
        """Write a file completely or not at all: it is written under another name and then renamed."""
        partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        self.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        try:
            with self.filesystem.open(partial, "wb") as file:
                yield file
            self.filesystem.mv(partial, path)
        except BaseException:
            if self.filesystem.exists(partial):
                self.filesystem.rm(partial)
            raise


class RangeReader:
    """Reads parts of files, each by one ``pread`` or one ranged request. It reads nothing else of a file.

    The last :data:`MAX_OPEN_FILES` local files stay open. Several threads may use a reader. It may be passed to other
    processes, where it opens its own files; forked processes never share connections.
    """

    def __init__(self, filesystem: Any) -> None:
        local = require("fsspec.implementations.local", extra="data", purpose="reading tar shards")
        self._filesystem = filesystem
        self.is_local = isinstance(filesystem, local.LocalFileSystem)
        self._process = os.getpid()
        self._open = functools.lru_cache(MAX_OPEN_FILES)(_OpenFile)

    def __reduce__(self) -> tuple[type[RangeReader], tuple[Any]]:
        return RangeReader, (self._filesystem,)

    def __call__(self, path: str, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on; fewer if the file ends earlier."""
        if self.is_local:
            return os.pread(self._open(path).descriptor, size, offset)
        if self._process != os.getpid():
            before = self._filesystem
            self._filesystem = type(before)(*before.storage_args, **before.storage_options)
            self._process = os.getpid()
        content: bytes = self._filesystem.cat_file(path, start=offset, end=offset + size)
        return content


class _OpenFile:
    """A file descriptor that is closed with its last reference, so never while another thread reads from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
