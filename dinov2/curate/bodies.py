"""Bodies of HTTP: as crawls store them, some as pages are and some as they were sent, and as servers send them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

AUTOMATIC = 47  # zlib's largest window, and its own header or that of gzip
MAX_CHUNK_LINE = 64  # bytes: 16 of a length, and an extension that nobody uses

_INFLATE: dict[str, Callable[[], zlib._Decompress]] = {  # 15: zlib's largest window; 32 more: a header of gzip too
    "gzip": lambda: zlib.decompressobj(47),
    "x-gzip": lambda: zlib.decompressobj(47),
    "deflate": lambda: zlib.decompressobj(47),
}


class UnknownEncodingError(ValueError):
    """A body is compressed in a way that is not read here."""


def plain_body(body: bytes, transfer: str, encoding: str, limit: int) -> bytes:
    """A page as it is, up to a limit; as much as there is of one that was cut off.

    Many archives hold bodies that were decoded, under headers which say that they are not: what does not begin as its
    headers say is taken to be plain.

    Args:
        body: as stored.
        transfer, encoding: values of Transfer-Encoding and Content-Encoding, "" where there are none.
        limit: bytes of the page.

    Raises:
        UnknownEncodingError: such as Brotli.
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
    """The chunks of a body in one, those before the first that is damaged; a body without any as it is."""
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
    """Decompresses zlib's and gzip's streams bit by bit; several of gzip's may follow one another.

    Attributes:
        complete: whether what came so far ends where a stream does.
    """

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(AUTOMATIC)
        self.complete = True

    def __call__(self, chunk: bytes, limit: int) -> bytes:
        """What a chunk holds, ``limit`` bytes at most, after which nothing may follow.

        Raises:
            zlib.error: this is no such stream.
        """
        body = b""
        while chunk and len(body) < limit:
            if self._stream.eof:
                self._stream = zlib.decompressobj(AUTOMATIC)
            body += self._stream.decompress(chunk, limit - len(body))
            chunk = self._stream.unused_data if self._stream.eof else b""
        self.complete = self._stream.eof
        return body
