"""What libraries say about an image while they decode it.

Pillow warns, tifffile logs, and libtiff writes to the standard error. None of them knows the name of the file. Their
words are caught here, so that they are shown with the name, or kept beside the image.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, TextIO

LINES, LENGTH = 3, 300  # of what is kept about one image; a damaged fax has a line for each row of pixels
SHOWN = 20  # images of a process whose remarks are shown
LOGGERS = ("tifffile", "PIL.TiffImagePlugin")

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class ImageRemarkWarning(UserWarning):
    """A library said something about an image that it decoded nevertheless; some of its pixels may be wrong."""


def plain(text: str) -> str:
    r"""Words of others as one line that every table and terminal takes. Signs that cannot be shown are escaped.

    Example:
        >>> from dinov2.data.remarks import plain
        >>> print(plain("Not\udce9 Found\n\x1b[0m"))
        Not\udce9 Found \x1b[0m
    """
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)


class _Listener(threading.local):
    """What the current thread has heard, and where it keeps its remarks; None if nobody asks."""

    heard: list[str] | None = None
    kept: list[str] | None = None


class _Hook:
    """Passes the warnings of threads that listen to their lists. It is in place while any thread listens.

    ``warnings.catch_warnings`` serves one thread at a time, and after it all other warnings would be shown once more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._threads += 1
            if self._threads == 1:
                self._show, warnings.showwarning = warnings.showwarning, self._hear
        try:
            yield
        finally:
            with self._lock:
                self._threads -= 1
                if self._threads == 0:
                    warnings.showwarning = self._show

    def _hear(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _listener.heard is None:
            self._show(message, category, filename, lineno, file, line)
            return
        _listener.heard.append(str(message))
        for module in list(sys.modules.values()):  # Python would not say the same about the next file
            if getattr(module, "__file__", None) == filename:
                vars(module).pop("__warningregistry__", None)


def _hear_record(record: logging.LogRecord) -> bool:
    """A filter of loggers. Records of threads that listen go to their lists only."""
    if _listener.heard is None:
        return True
    _listener.heard.append(record.getMessage())
    return False


_listener, _hook = _Listener(), _Hook()
_native = threading.Lock()  # the standard error belongs to the whole process
os.register_at_fork(after_in_child=lambda: _start_again())
for _name in LOGGERS:
    logging.getLogger(_name).addFilter(_hear_record)


def _start_again() -> None:
    """A forked process has one thread, and no other thread will return its locks."""
    global _hook, _native
    _hook, _native = _Hook(), threading.Lock()


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Catch what libraries say in this thread. At the end of the context the list has their words, one entry a line.

    Entries are few and short. They hold no addresses of memory, so they are the same in every run. If several threads
    decode, Python may drop a warning that another thread has at the same moment.

    Example:
        >>> import warnings
        >>> from dinov2.data.remarks import overheard
        >>> with overheard() as words:
        ...     warnings.warn("Corrupt EXIF data")
        >>> words
        ['Corrupt EXIF data']
    """
    words: list[str] = []
    before, heard = _listener.heard, list[str]()
    _listener.heard = heard
    try:
        with _hook():
            yield words
    finally:
        _listener.heard = before
        lines = [_ADDRESS.sub("", plain(line))[:LENGTH] for text in heard for line in text.splitlines()]
        distinct = list(dict.fromkeys(filter(None, lines)))
        words += distinct[:LINES]
        if more := len(distinct) - LINES:
            words += [f"and {more} more"] if more > 0 else []


@contextmanager
def native_overheard() -> Iterator[None]:
    """Within :func:`overheard`, also catch what C libraries write to the standard error.

    This takes the standard error of the whole process, so other threads wait for their turn. It costs about 70
    microseconds. So only decoders that write there are run in it.
    """
    if _listener.heard is None:
        yield
        return
    with _native, ExitStack() as stack:
        try:
            before = os.dup(2)
            stack.callback(os.close, before)
            file = stack.enter_context(_scratch())
        except OSError:  # the process has no standard error, or may open no more files
            yield
            return
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            file.seek(0)
            _listener.heard.append(file.read(LENGTH * LENGTH).decode("utf-8", "replace"))


def _scratch() -> IO[bytes]:
    """A file for some lines. In memory it needs neither a folder nor space on a disk."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("words"), "w+b")
    return tempfile.TemporaryFile()


@contextmanager
def kept_remarks() -> Iterator[list[str]]:
    """Keep the remarks on images that this thread decodes in a list, instead of showing them as warnings."""
    before, kept = _listener.kept, list[str]()
    _listener.kept = kept
    try:
        yield kept
    finally:
        _listener.kept = before


_shown = 0


def remark(name: str, words: Sequence[str]) -> None:
    """Pass on what was said about an image that was decoded nevertheless.

    Warns:
        ImageRemarkWarning: nobody keeps remarks. A process warns of its first :data:`SHOWN` images.
    """
    global _shown
    if _listener.kept is not None:
        _listener.kept.extend(words)
        return
    _shown += 1
    if _shown <= SHOWN:
        last = "" if _shown < SHOWN else " (this process shows no more remarks on images)"
        warnings.warn(f"image {name}: {'; '.join(words)}{last}", ImageRemarkWarning, stacklevel=3)
