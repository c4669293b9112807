"""Pages in files: HTML as it is, WARC and WAT of crawls."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from dinov2.curate.extract.config import ExtractConfig
from dinov2.curate.extract.html import MAX_ALT, Link, Page, parse_page
from dinov2_kernels._extras import require

HTML, WARC, WAT = (".html", ".htm", ".xhtml"), (".warc",), (".wat",)
COMPRESSED = ".gz"

DAMAGED, NO_HTML, TRUNCATED_PAGE = "damaged archive", "no HTML", "page too large"


class Found(NamedTuple):
    """A page, and its address."""

    url: str
    page: Page
    robots: list[str]


def kind_of(path: str) -> tuple[str, ...] | None:
    """HTML, WARC or WAT by a file's name; None for other files."""
    name = path.lower().removesuffix(COMPRESSED)
    return next((kind for kind in (WAT, WARC, HTML) if name.endswith(kind) or f"{kind[0]}." in name), None)


def read_html(file: IO[bytes], path: str, url: str, config: ExtractConfig, dropped: Counter[str]) -> Iterator[Found]:
    """The page of an HTML file, which may be compressed."""
    content = b""
    try:
        with gzip.open(file) if path.lower().endswith(COMPRESSED) else file as opened:
            content = opened.read(config.max_page_bytes + 1)
    except (OSError, EOFError, zlib.error):
        dropped[DAMAGED] += 1
        return
    if len(content) > config.max_page_bytes:
        dropped[TRUNCATED_PAGE] += 1
    page = parse_page(content[: config.max_page_bytes], url)
    yield Found(url or page.base, page, page.robots)


def read_warc(file: IO[bytes], config: ExtractConfig, dropped: Counter[str]) -> Iterator[Found]:
    """The HTML pages among the responses of a WARC file; what follows damage is lost, and counted once."""
    warc = require("fastwarc.warc", extra="curate", purpose="reading WARC files")
    records = warc.ArchiveIterator(file, record_types=warc.WarcRecordType.response, parse_http=True, quirks_mode=True)
    for record in _until_damaged(records, dropped):
        headers = record.http_headers
        kind = (record.http_content_type or "").lower() if headers is not None else ""
        if "html" not in kind:
            dropped[NO_HTML] += 1
            continue
        content = record.reader.read(config.max_page_bytes + 1)
        if len(content) > config.max_page_bytes:
            dropped[TRUNCATED_PAGE] += 1
        url = record.headers.get("WARC-Target-URI", "")
        page = parse_page(content[: config.max_page_bytes], url, record.http_charset)
        tags = [value for name, value in headers.astuples() if name.lower() == "x-robots-tag"]
        yield Found(url, page, [*page.robots, *tags])


def read_wat(file: IO[bytes], config: ExtractConfig, dropped: Counter[str]) -> Iterator[Found]:
    """The pages that a WAT file of Common Crawl tells of: their links are listed in JSON, as ``IMG@/src``."""
    warc = require("fastwarc.warc", extra="curate", purpose="reading WAT files")
    records = warc.ArchiveIterator(file, record_types=warc.WarcRecordType.metadata, parse_http=False, quirks_mode=True)
    for record in _until_damaged(records, dropped):
        try:
            envelope = json.loads(record.reader.read(config.max_page_bytes))["Envelope"]
            response = envelope["Payload-Metadata"]["HTTP-Response-Metadata"]
            html = response["HTML-Metadata"]
            url = str(envelope["WARC-Header-Metadata"]["WARC-Target-URI"])
            entries = list(html.get("Links", []))
        except (ValueError, KeyError, TypeError, AttributeError):
            dropped[NO_HTML] += 1
            continue
        yield _page_of_wat(url, html, response, entries)


def _page_of_wat(url: str, html: dict[str, Any], response: dict[str, Any], entries: list[Any]) -> Found:
    head = html.get("Head") if isinstance(html.get("Head"), dict) else {}
    links = dict[str, Link]()
    for entry in entries:
        if isinstance(entry, dict) and str(entry.get("path", "")).upper().startswith("IMG@") and entry.get("url"):
            alt = " ".join(str(entry.get("alt", "")).split())[:MAX_ALT]
            links.setdefault(str(entry["url"]), Link(str(entry["url"]), alt, str(entry["path"])))
    metas = head.get("Metas", []) if isinstance(head, dict) else []
    robots = [
        str(m.get("content", "")) for m in metas if isinstance(m, dict) and str(m.get("name")).lower() == "robots"
    ]
    headers = response.get("Headers") if isinstance(response.get("Headers"), dict) else {}
    robots += [str(value) for name, value in (headers or {}).items() if name.lower() == "x-robots-tag"]
    base = str(head.get("Base") or url) if isinstance(head, dict) else url
    return Found(url, Page(base, robots, list(links.values())), robots)


def _until_damaged(records: Iterator[Any], dropped: Counter[str]) -> Iterator[Any]:
    """Records up to the first that cannot be read: its length is unknown, and so is where the next begins."""
    while True:
        try:
            record = next(records, None)
        except Exception:  # whatever a damaged file raises in the parser
            dropped[DAMAGED] += 1
            return
        if record is None:
            return
        yield record
