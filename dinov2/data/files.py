"""The files under a folder, and the spelling of their names as text."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections import deque
from typing import NamedTuple

HIDDEN, SYSTEM = "hidden", "of the system"
_SYSTEM_FOLDERS = frozenset({"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information"})
"""Folders of storage devices and systems; some hold small copies of every image."""

_LOOKS_ESCAPED = re.compile(r"\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
_SPELLED_SURROGATE = re.compile(r"\\udc([89a-f][0-9a-f])")  # Python's spelling of a byte that is not UTF-8


class BrokenLinkWarning(UserWarning):
    """Links in a folder lead nowhere, so files may be missing."""


class Listing(NamedTuple):
    """The contents of a folder and of all folders in it.

    Attributes:
        files: sorted paths, relative to the folder, of everything that is not a folder; also links to files, links with
            the name of a file that lead nowhere, and pipes.
        broken: sorted paths of all links that lead nowhere.
    """

    files: list[str]
    broken: list[str]


def list_files(root: str | os.PathLike[str]) -> Listing:
    """List all files under a folder, of any nesting.

    Links to folders are followed, but each folder is listed once, however many links lead to it, and also if links lead
    round in a circle. A folder has its own path under the root rather than that of a link to it. If several
    links lead to a folder elsewhere, the first one counts: one that takes fewer links to reach, then the first by name.
    Links to files are files of their own.

    Raises:
        OSError: a folder cannot be listed; the message names it.
    """
    root = os.fspath(root)
    files: list[str] = []
    broken: list[str] = []
    listed = {_identity(os.stat(root), root)}
    links = deque([""])  # folders that only links lead to, in the order in which they were found
    while links:
        start = links.popleft()
        if start:
            identity = _identity(os.stat(os.path.join(root, start)), os.path.join(root, start))
            if identity in listed:
                continue
            listed.add(identity)
        folders, found = [start], list[str]()
        while folders:
            folder, inside = folders.pop(), list[str]()
            for entry in _entries(os.path.join(root, folder)):
                path = os.path.join(folder, entry.name)
                if not entry.is_symlink():
                    if not entry.is_dir():
                        files.append(path)
                    elif (identity := _identity(os.stat(entry.path), entry.path)) not in listed:
                        listed.add(identity)
                        inside.append(path)
                elif (target := _target(entry.path)) is None:
                    broken.append(path)
                    files.append(path)
                elif stat.S_ISDIR(target.st_mode):
                    found.append(path)
                else:
                    files.append(path)
            folders.extend(reversed(inside))
        links.extend(sorted(found))
    return Listing(sorted(files), sorted(broken))


def warn_of_broken_links(root: str | os.PathLike[str], broken: list[str]) -> None:
    """Warn if there are links that lead nowhere, other than hidden ones."""
    named = [path for path in broken if not any(part.startswith(".") for part in path.split(os.sep))]
    if named:
        some = ", ".join(map(quoted, named[:3])) + (", ..." if len(named) > 3 else "")
        warnings.warn(
            f"{len(named)} links under {quoted(root)} lead nowhere, so files may be missing: {some}",
            BrokenLinkWarning,
            stacklevel=3,
        )


def reason_of_place(path: str) -> str | None:
    """Why a file is left out for the place where it is, whatever it is: hidden, or in a folder of a system."""
    if path.startswith(".") or "/." in path:  # in few paths, so that a million take no time
        if any(part.startswith(".") and part.strip(".") for part in path.split("/")):
            return HIDDEN
    elif any(folder in path for folder in _SYSTEM_FOLDERS) and not _SYSTEM_FOLDERS.isdisjoint(path.split("/")[:-1]):
        return SYSTEM
    return None


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:  # to skip the folder would silently change the dataset
        raise type(error)(f"folder {quoted(folder)} under root cannot be listed: {error.strerror}") from error


def _target(link: str) -> os.stat_result | None:
    """The place that a link leads to; None if it leads nowhere."""
    try:
        return os.stat(link)
    except OSError:
        return None


def _identity(status: os.stat_result, path: str) -> tuple[int, int] | str:
    """The identity of a folder, whatever its path. Some file systems do not number their files."""
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def escaped(name: str) -> str:
    r"""The name of a file as text that every file format and terminal takes.

    Bytes that are not UTF-8 become ``\\xNN``. So does a backslash that would look like the beginning of such an escape.
    All other names stay as they are. :func:`unescaped` returns the name.

    Example:
        >>> from dinov2.data.files import escaped
        >>> print(escaped("caf\udce9.png"), escaped("a b.png"))
        caf\xe9.png a b.png
    """
    if name.isascii() and "\\" not in name:
        return name
    return _utf8(_LOOKS_ESCAPED.sub(r"\\x5c", name)).decode("utf-8", "backslashreplace")


def unescaped(text: str) -> str:
    """The name of the file that :func:`escaped` made ``text`` of, as functions of Python take it."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), _utf8(text)))


def quoted(name: str | os.PathLike[str]) -> str:
    """A name for messages, in quotes: line breaks and other signs that cannot be shown are escaped."""
    return _SPELLED_SURROGATE.sub(r"\\x\1", repr(os.fspath(name)))


def shown(name: str) -> str:
    """A name for messages: as it is, or in quotes if it has line breaks or other signs that cannot be shown."""
    return name if name.isprintable() else quoted(name)


def _utf8(name: str) -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte, such as Windows allows
        return name.encode("utf-8", "surrogatepass")
