"""The files in a tar, in order, also behind damaged parts of it.

Readers of tars stop without a word at the first header that is not one, so a damaged header hides all files behind it.
This one looks for the next header, and says what it left out.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from dinov2.data.files import quoted

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
MAX_EXTENSION = 2**24  # bytes of a long name, or of other attributes, that stand before a header
EXTENSIONS = (b"L", b"K", b"x", b"g", b"X")  # types of these

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


@dataclass
class Findings:
    """Faults of a tar whose files can be read all the same.

    Attributes:
        damaged: first byte and number of bytes of each part that belongs to no file.
        joined: bytes at which it goes on behind an end mark, as tars that were joined do.
        unmarked: whether the end mark is missing.
        empty: whether there is no file in it.
    """

    damaged: list[tuple[int, int]] = field(default_factory=list)
    joined: list[int] = field(default_factory=list)
    unmarked: bool = False
    empty: bool = False

    def __str__(self) -> str:
        sentences = []
        if self.damaged:
            parts = _some([f"{size:,} bytes at {start:,}" for start, size in self.damaged])
            sentences.append(f"{parts} hold no readable header and were skipped, with any files in them")
        if self.joined:
            places = _some([f"{place:,}" for place in self.joined])
            sentences.append(f"it goes on behind an end mark, at byte {places}, and was read on")
        if self.unmarked:
            sentences.append("it has no end mark, so its end may be missing")
        if self.empty:
            sentences.append("it holds no file")
        return "; ".join(sentences)


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def members(file: IO[bytes], findings: Findings) -> Iterator[tarfile.TarInfo]:
    """Headers of everything in an uncompressed tar, in order.

    Args:
        file: a tar; its position is not kept.
        findings: gets what is wrong with the tar.

    Raises:
        tarfile.ReadError: it is no tar, a size is negative, or no file can be found behind a damaged part.
        EOFError: it ends within a file or a header.
    """
    size = file.seek(0, os.SEEK_END)
    reader = tarfile.TarFile(fileobj=io.BytesIO(2 * ZEROS), encoding="utf-8", errors="surrogateescape")
    reader.fileobj = file  # opened without it, because the reader refuses a tar whose first header is damaged
    place = last_end = number = 0
    garbage: int | None = None  # first block since the last file that is neither a header nor zeros
    while place < size:
        file.seek(place)
        block = file.read(BLOCK)
        if block == ZEROS[: len(block)]:
            place += BLOCK
            continue
        member = _header(block, place, reader, searching=garbage is not None)
        if member is None:
            garbage = place if garbage is None else garbage
            place += BLOCK
            continue
        if member.size < 0:  # the next header would be before this one
            raise tarfile.ReadError(f"{quoted(member.name)} has a negative size")
        if garbage is not None:
            findings.damaged.append((garbage, place - garbage))
        elif place > last_end:
            findings.joined.append(place)
        data_end = reader.offset if member.issparse() else member.offset_data + member.size
        if reader.offset > member.offset_data and data_end > size:
            raise EOFError(f"it ends within {quoted(member.name)}")
        place = last_end = reader.offset
        number, garbage = number + 1, None
        yield member
    if size == 0:
        raise tarfile.ReadError("it is empty")
    if garbage is None:
        findings.unmarked, findings.empty = last_end >= size, number == 0
    elif number == 0:
        raise tarfile.ReadError(_no_tar(file))
    elif garbage > last_end:
        findings.damaged.append((garbage, size - garbage))
    elif size - garbage < BLOCK:
        raise EOFError("it ends within the header of a file")
    else:
        raise tarfile.ReadError(f"it is damaged from byte {garbage:,} on, and no file can be found behind that")


def _header(block: bytes, place: int, reader: tarfile.TarFile, searching: bool) -> tarfile.TarInfo | None:
    """The header that begins with a block, with the long names and attributes before it; None if it is damaged.

    Args:
        block: the block at ``place``.
        reader: its ``offset`` becomes the end of the file that the header describes.
        searching: whether this may be the content of a file, of which only blocks with tar's own mark are headers.
    """
    if searching and block[257:262] not in (b"ustar", bytes(5)):
        return None
    file: IO[bytes] = reader.fileobj  # type: ignore[assignment]
    file.seek(place)
    try:
        if block[156:157] in EXTENSIONS or block[124:125] >= b"\x80":  # a size that no octal digits spell
            first = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if first.size < 0:
                return first
            if first.type in EXTENSIONS and first.size > MAX_EXTENSION:
                return None
        member = tarfile.TarInfo.fromtarfile(reader)
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError):  # all from damaged attributes
        return None
    return member


def _no_tar(file: IO[bytes]) -> str:
    file.seek(0)
    beginning = file.read(8)
    for mark, kind in _COMPRESSED.items():
        if beginning.startswith(mark):
            return f"it is compressed with {kind}, but images are read from their places in an uncompressed tar"
    return f"it is no tar: it begins with {beginning!r}"
