"""Pages in files: HTML as it is, WARC and WAT of crawls."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from dinov2.curate.extract.config import ExtractConfig
from dinov2.curate.extract.html import MAX_ALT, Link, Page, parse_page
from dinov2.curate.extract.transfer import UnknownEncodingError, plain_body
from dinov2_kernels._extras import require

HTML, WARC, WAT = (".html", ".htm", ".xhtml"), (".warc",), (".wat",)
COMPRESSED = ".gz"

DAMAGED, NO_HTML, TRUNCATED_PAGE = "damaged archive", "no HTML", "page too large"
UNKNOWN_ENCODING, UNREADABLE = "unknown encoding", "page not parsed"

MAX_METADATA = 20_000_000  # bytes of a record of WAT, which is JSON and of no use in part
PIECE = 65_536


class Found(NamedTuple):
    """A page, and its address."""

    url: str
    page: Page
    robots: list[str]


def kind_of(path: str) -> tuple[str, ...] | None:
    """HTML, WARC or WAT by a file's name; None for other files."""
    name = path.lower().removesuffix(COMPRESSED)
    return next((kind for kind in (WAT, WARC, HTML) if name.endswith(kind) or f"{kind[0]}." in name), None)


def read_html(file: IO[bytes], path: str, url: str, config: ExtractConfig, troubles: Counter[str]) -> Iterator[Found]:
    """The page of an HTML file, which may be compressed."""
    limit = config.max_page_bytes
    with gzip.GzipFile(fileobj=file) if path.lower().endswith(COMPRESSED) else file as opened:
        content, damaged = _read(opened.read, limit + 1, (gzip.BadGzipFile, EOFError, zlib.error))
    troubles[DAMAGED] += damaged
    troubles[TRUNCATED_PAGE] += len(content) > limit
    if page := _parsed(content[:limit], url, None, config, troubles):
        yield Found(url or page.base, page, page.robots)


def read_warc(file: IO[bytes], config: ExtractConfig, troubles: Counter[str]) -> Iterator[Found]:
    """The HTML pages among the responses of a WARC file; what follows damage is lost, and counted once."""
    limit = config.max_page_bytes
    for record in _records(file, "response", troubles):
        headers = record.http_headers
        kind = (record.http_content_type or "").lower() if headers is not None else ""
        if not kind and record.content_length == 0:  # where a file was cut off, nothing follows
            troubles[DAMAGED] += 1
            continue
        if "html" not in kind:
            troubles[NO_HTML] += 1
            continue
        body, damaged = _read(record.reader.read, limit + 1, (OSError,))
        damaged = damaged or len(body) < min(record.content_length, limit)  # of which the beginning is read
        named: dict[str, list[str]] = {}
        for name, value in headers.astuples():
            named.setdefault(name.lower(), []).append(value)
        transfer, encoding = (",".join(named.get(name, [])) for name in ("transfer-encoding", "content-encoding"))
        try:
            content = plain_body(body, transfer, encoding, limit + 1)
        except UnknownEncodingError:
            troubles[UNKNOWN_ENCODING] += 1
            content = b""
        troubles[TRUNCATED_PAGE] += max(len(content), len(body)) > limit
        troubles[DAMAGED] += damaged
        url = record.headers.get("WARC-Target-URI", "").strip("<>")  # in which some versions of Wget put it
        if page := _parsed(content[:limit], url, record.http_charset, config, troubles):
            yield Found(url, page, [*page.robots, *named.get("x-robots-tag", [])])
        if damaged:
            return


def read_wat(file: IO[bytes], config: ExtractConfig, troubles: Counter[str]) -> Iterator[Found]:
    """The pages that a WAT file of Common Crawl tells of: their links are listed in JSON, as ``IMG@/src``."""
    for record in _records(file, "metadata", troubles):
        text, damaged = _read(record.reader.read, MAX_METADATA, (OSError,))
        try:
            found = _page_of_wat(json.loads(text)["Envelope"], config.agent)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # of JSON there is any kind
            found = None
            troubles[NO_HTML] += not damaged
        if found is not None:
            yield found
        if damaged:
            troubles[DAMAGED] += 1
            return


def _page_of_wat(envelope: dict[str, Any], agent: str) -> Found:
    response = envelope["Payload-Metadata"]["HTTP-Response-Metadata"]
    html, url = response["HTML-Metadata"], str(envelope["WARC-Header-Metadata"]["WARC-Target-URI"]).strip("<>")
    head, links = html.get("Head") or {}, dict[str, Link]()
    for entry in html.get("Links") or []:
        if isinstance(entry, dict) and str(entry.get("path", "")).upper().startswith("IMG@") and entry.get("url"):
            alt = " ".join(str(entry.get("alt", "")).split())[:MAX_ALT]
            links.setdefault(str(entry["url"]), Link(str(entry["url"]), alt, str(entry["path"])))
    robots = [
        str(meta.get("content", ""))
        for meta in head.get("Metas") or []
        if str(meta.get("name")).lower() in ("robots", "googlebot-image", agent.lower())
    ]
    for name, value in (response.get("Headers") or {}).items():
        if name.lower() == "x-robots-tag":
            robots += map(str, value) if isinstance(value, list) else [str(value)]  # a header that was sent twice
    return Found(url, Page(str(head.get("Base") or url), robots, list(links.values())), robots)


def _parsed(
    content: bytes, url: str, charset: str | None, config: ExtractConfig, troubles: Counter[str]
) -> Page | None:
    try:
        return parse_page(content, url, charset, config.agent)
    except (ImportError, MemoryError):
        raise
    except Exception:  # of a parser that is not ours, on bytes that are anybody's: not the end of all other pages
        troubles[UNREADABLE] += 1
        return None


def _read(read: Callable[[int], bytes], size: int, damages: tuple[type[Exception], ...]) -> tuple[bytes, bool]:
    """So many bytes, or what there is before damage; and whether there is damage."""
    parts, left = list[bytes](), size
    try:
        while left > 0 and (part := read(min(left, PIECE))):
            parts.append(part)
            left -= len(part)
    except damages:
        return b"".join(parts), True
    return b"".join(parts), False


def _records(file: IO[bytes], kind: str, troubles: Counter[str]) -> Iterator[Any]:
    """Records up to the first that cannot be read: its length is unknown, and so is where the next begins."""
    warc = require("fastwarc.warc", extra="curate", purpose="reading WARC files")
    types = getattr(warc.WarcRecordType, kind)
    try:
        records = warc.ArchiveIterator(_Source(file), record_types=types, parse_http=kind == "response")
        while (record := next(records, None)) is not None:
            yield record
    except (ImportError, MemoryError, StorageError):
        raise
    except Exception:  # whatever a damaged file raises in the parser
        troubles[DAMAGED] += 1


class StorageError(Exception):
    """A file cannot be read now, which says nothing about what is in it: the task is to be tried again."""


class _Source:
    """A file for FastWARC, whose own errors are of the same type as those of a disk or a network."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            raise StorageError(f"{type(error).__name__}: {error}") from error

    def tell(self) -> int:
        return self._file.tell()
