"""Decodes bodies of HTTP responses: those that crawls store, decoded or not, and those that servers send."""

from __future__ import annotations

import zlib
from collections.abc import Callable

AUTOMATIC = 47  # zlib's largest window; the header may be zlib's or gzip's
MAX_CHUNK_LINE = 64  # bytes: 16 for a length, the rest for an extension that nobody uses

_INFLATE: dict[str, Callable[[], zlib._Decompress]] = {  # 47 = 15, zlib's largest window, + 32, either header
    "gzip": lambda: zlib.decompressobj(47),
    "x-gzip": lambda: zlib.decompressobj(47),
    "deflate": lambda: zlib.decompressobj(47),
}


class UnknownEncodingError(ValueError):
    """A body has a compression that is not supported here."""


def plain_body(body: bytes, transfer: str, encoding: str, limit: int) -> bytes:
    """Decode a page up to a limit. If the page was cut off, the result is its beginning.

    Many archives hold decoded bodies whose headers say that they are encoded. A body that does not begin as its headers
    say is taken to be plain.

    Args:
        body: bytes as the archive stores them.
        transfer, encoding: values of Transfer-Encoding and Content-Encoding, "" for a missing header.
        limit: largest number of bytes of the page.

    Raises:
        UnknownEncodingError: the encoding is not supported, such as Brotli.
    """
    if transfer.strip().lower() == "chunked":
        body = _unchunked(body)
    names = [name.strip().lower() for name in encoding.split(",")]
    for name in reversed([name for name in names if name not in ("", "identity")]):
        if name not in _INFLATE:
            raise UnknownEncodingError(name)
        body = _inflated(body, name, limit)
    return body[:limit]


def _unchunked(body: bytes) -> bytes:
    """Join the chunks of a body up to the first damaged one. A body without chunks is returned as it is."""
    parts, position = list[bytes](), 0
    while (end := body.find(b"\r\n", position, position + MAX_CHUNK_LINE)) >= 0:
        try:
            length = int(body[position:end].partition(b";")[0], 16)
        except ValueError:
            break
        if length <= 0:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + length])
        position = end + 2 + length + 2
    return b"".join(parts) if parts else body


def _inflated(body: bytes, name: str, limit: int) -> bytes:
    inflate = _INFLATE[name]()
    parts, size = list[bytes](), 0
    try:
        while body and size < limit and not inflate.eof:
            parts.append(inflate.decompress(body[:65_536], limit - size))
            size += len(parts[-1])
            body = inflate.unconsumed_tail + body[65_536:]
    except zlib.error:
        return b"".join(parts) if size else body
    return b"".join(parts)


class Inflater:
    """Decompresses streams of zlib and gzip piece by piece. Several streams may follow one another.

    Attributes:
        complete: whether the input so far ends at the end of a stream.
    """

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(AUTOMATIC)
        self.complete = True

    def __call__(self, chunk: bytes, limit: int) -> bytes:
        """Decompress a chunk to at most ``limit`` bytes. After a result of ``limit`` bytes no chunk may follow.

        Raises:
            zlib.error: the input is no such stream.
        """
        body = b""
        while chunk and len(body) < limit:
            if self._stream.eof:
                self._stream = zlib.decompressobj(AUTOMATIC)
            body += self._stream.decompress(chunk, limit - len(body))
            chunk = self._stream.unused_data if self._stream.eof else b""
        self.complete = self._stream.eof
        return body
