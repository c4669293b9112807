"""Storage of shards: a folder on a disk, or any URL that fsspec supports (``s3://``, ``memory://``, ...)."""

from __future__ import annotations

import functools
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from dinov2.data.files import Listing, list_files, quoted, warn_of_broken_links
from dinov2.extras import require

LONG_NAME = 230  # bytes; the name of a file may have 255
VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
"""Fields of fsspec's storages that tell versions of a file apart."""
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

    def find(self) -> dict[str, int]:
        """Sizes of all files under the root, of any nesting, by their paths relative to it, in sorted order.

        On a disk, links are followed as :func:`~dinov2.data.files.list_files` says. There are none if the root is no
        folder.

        Raises:
            OSError: a folder cannot be listed.

        Warns:
            BrokenLinkWarning: there are links that lead nowhere.
        """
        if is_local(self.filesystem):
            return {path: _size(os.path.join(self.root, path)) for path in self.paths()}
        found = self.filesystem.find(self.root, detail=True)
        return {path[len(self.root) + 1 :]: found[path]["size"] for path in sorted(found)}

    def paths(self) -> list[str]:
        """The paths of :meth:`find`, without their sizes, which a disk has to look up one by one."""
        if not is_local(self.filesystem):
            return list(self.find())
        listing = list_files(self.root) if os.path.isdir(self.root) else Listing([], [])
        warn_of_broken_links(self.root, listing.broken)
        return listing.files

    def stamps(self, paths: Sequence[str]) -> list[str]:
        """For each path of :meth:`find` a text that changes when the file does: its size, and its time of change or
        what else the storage tells of its version; on a disk also whether it may be read."""
        if is_local(self.filesystem):
            return [_stamp(os.path.join(self.root, path)) for path in paths]
        found = self.filesystem.find(self.root, detail=True)
        return [_version(found[f"{self.root}/{path}"]) for path in paths]

    def stamp(self, path: str) -> str:
        """The same for one file, by its full path."""
        if is_local(self.filesystem):
            return _stamp(path)
        return _version(self.filesystem.info(path))

    def check_writable(self, folder: str) -> None:
        """Create a folder if necessary and check that files can be written into it. Only local folders are checked.

        Raises:
            OSError: they cannot; the message names the folder.
        """
        if not is_local(self.filesystem):
            return
        path = f"{self.root}/{folder}".rstrip("/")
        try:
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise type(error)(f"folder {quoted(path)} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def replace(self, path: str) -> Iterator[IO[bytes]]:
        """Write a file completely or not at all: it is written under another name and then renamed."""
        folder, _, name = path.rpartition("/")
        name = name if len(os.fsencode(name)) < LONG_NAME else name[:50]  # or the name of the part would be too long
        partial = f"{folder}/{name}.{uuid.uuid4().hex[:8]}.partial"
        self.filesystem.makedirs(folder, exist_ok=True)
        try:
            with self.filesystem.open(partial, "wb") as file:
                yield file
            self.filesystem.mv(partial, path)
        except BaseException:
            if self.filesystem.exists(partial):
                self.filesystem.rm(partial)
            raise


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link that leads nowhere
        return os.lstat(path).st_size


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere
        status = os.lstat(path)
    closed = "" if os.access(path, os.R_OK) else " closed"  # to open it to us leaves its time as it is
    return f"{status.st_size} {status.st_mtime_ns}{closed}"


def _version(entry: dict[str, Any]) -> str:
    return " ".join(str(entry[name]) for name in ("size", *VERSIONS) if entry.get(name))


def is_local(filesystem: Any) -> bool:
    """Whether a file system of fsspec is that of this machine."""
    local = require("fsspec.implementations.local", extra="data", purpose="reading tar shards")
    return isinstance(filesystem, local.LocalFileSystem)


class RangeReader:
    """Reads parts of files, each by one ``pread`` or one ranged request. It reads nothing else of a file.

    The last :data:`MAX_OPEN_FILES` local files stay open. Several threads may use a reader. It may be passed to other
    processes, where it opens its own files; forked processes never share connections.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self.is_local = is_local(filesystem)
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
