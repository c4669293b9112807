"""The extract stage: takes the links to images from every web page, then removes repeats."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple
from urllib.parse import quote, urlsplit

from dinov2.configuration import Config, Count
from dinov2.curate.bodies import UnknownEncodingError, plain_body
from dinov2.curate.charsets import charset_in
from dinov2.curate.html import MAX_ALT, Link, Page, parse_page
from dinov2.curate.pool import Skipped, write_skipped
from dinov2.curate.sorted_tables import key_of_text, key_ranges, read_range, text_table, write_sorted
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.curate.web import RefusedURLError, is_blocked, normal_url, opts_out, read_domains
from dinov2.data.files import escaped
from dinov2.data.outputs import of_outputs
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

COLUMNS = ("url", "page", "alt", "attribute")
BLOCKED, OPTED_OUT, REPEATED = "blocked domain", "page opted out", "repeated link"
NO_FILE = "cannot be opened"
PER_BUCKET = 100_000  # links that one task compares to remove repeats
HTML, WARC, WAT = (".html", ".htm", ".xhtml"), (".warc",), (".wat",)
COMPRESSED = ".gz"

DAMAGED, NO_HTML, TRUNCATED_PAGE = "damaged archive", "no HTML", "page too large"
UNKNOWN_ENCODING, UNREADABLE = "unknown encoding", "page not parsed"

MAX_METADATA = 20_000_000  # bytes of a WAT record; it is JSON, so a part of it is useless
PIECE = 65_536


@dataclass(frozen=True)
class ExtractConfig(Config, at="extract"):
    """Which links the extract stage takes from pages."""

    base_url: str = ""
    """Plain HTML files come from this address if they do not say where they come from; their path is appended."""
    blocked_domains: str = ""
    """This file or URL lists domains, one a line. Nothing is taken from them or from their subdomains."""
    allowed_domains: str = ""
    """This file or URL lists the only domains that images are taken from, unless they are blocked. Without a file, all
    domains are allowed."""
    agent: str = "dinov2-curate"
    """This is our name as a robot, by which pages may address us."""
    honour_opt_out: bool = True
    """Take nothing from pages that ask so in a robots meta tag or in X-Robots-Tag."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    """Pages ask by these words."""
    max_page_bytes: Count = 2_000_000
    """The rest of a page is not read after this many bytes."""
    files_per_shard: Count = 1000
    """A task reads this many HTML files. An archive is a task by itself."""


def extract(pages: str, config: ExtractConfig, output: str) -> Steps[str]:
    """Extract links to images from pages.

    Args:
        pages: folder or URL, of any nesting, with files ``.html``, ``.warc`` and ``.wat``, each also with ``.gz``.
            Reports of curations are not pages.
        config: which links are taken.
        output: folder or URL of the whole curation.

    Returns:
        Folder of tables with the columns url, page, alt and attribute. No URL is repeated.

    Raises:
        ValueError: the folder has no such files.
    """
    storage = Storage(pages)
    found = storage.find()
    own = of_outputs(storage, found)
    sizes = {path: size for path, size in found.items() if kind_of(path) and path not in own}
    if not sizes:
        raise ValueError(f"pages: expected a folder of HTML, WARC or WAT files, got {pages!r}, which has none")
    documents = [path for path in sizes if kind_of(path) == HTML]
    pieces = [
        tuple(documents[i : i + config.files_per_shard]) for i in range(0, len(documents), config.files_per_shard)
    ]
    pieces += [(path,) for path in sizes if kind_of(path) != HTML]
    tasks = [Task(f"{number:05d}", _extract, (pages, piece, config)) for number, piece in enumerate(pieces)]
    lists = [sorted(read_domains(path)) for path in (config.blocked_domains, config.allowed_domains)]
    stamps = storage.stamps(list(sizes))
    listing = [[escaped(path), stamp] for path, stamp in zip(sizes, stamps, strict=True)]
    settings = [config, digest(lists), digest(listing)]
    links = Step(output, "extract-links", settings, (pages,), tasks, "links", version=2)
    yield links
    buckets = max(1, links.counts().rows_out // PER_BUCKET)
    shards = tuple(task.shard for task in links.tasks)
    tasks = [
        Task(f"{number:05d}", _unique, (links.folder, shards, first, last))
        for number, (first, last) in enumerate(key_ranges(buckets))
    ]
    unique = Step(output, "extract-unique", buckets, (links.folder,), tasks, "links")
    yield unique
    return unique.folder


def _extract(output: Output, pages: str, paths: tuple[str, ...], config: ExtractConfig) -> Counts:
    """Task: write the links in some files, sorted by key, and the table of files and pages with trouble.

    Each link keeps only its first occurrence.
    """
    links: dict[str, tuple[str, str, str, str]] = {}
    dropped, troubles, number_of_pages, seen = Counter[str](), Troubles(), 0, 0
    domains = read_domains(config.blocked_domains), read_domains(config.allowed_domains)
    for found in _pages(pages, paths, config, troubles):
        number_of_pages += 1
        silent = config.honour_opt_out and opts_out(found.robots, config.opt_out, config.agent)
        try:
            page = normal_url(found.url)
            blocked = is_blocked(page, domains[0])
        except RefusedURLError:
            page, blocked = found.url, False
        base = found.page.base if _is_url(found.page.base) else ""
        for link in found.page.links:
            seen += 1
            try:
                url = normal_url(link.url, base)
            except RefusedURLError as error:
                dropped[error.reason] += 1
                continue
            if silent:
                dropped[OPTED_OUT] += 1
            elif blocked or is_blocked(url, domains[0]) or (domains[1] and not is_blocked(url, domains[1])):
                dropped[BLOCKED] += 1
            elif url in links:
                dropped[REPEATED] += 1
            else:
                links[url] = (url, page, link.alt, link.attribute)
    rows = sorted((key_of_text(url), row) for url, row in links.items())
    write_sorted(output, [key for key, _ in rows], text_table(COLUMNS, [row for _, row in rows]))
    write_skipped(output, troubles.named)
    figures = {"pages": number_of_pages, **troubles.counts}
    return Counts(seen, len(rows), dict(sorted(dropped.items())), dict(sorted(figures.items())))


class Troubles:
    """Files and pages that could not be read as a whole.

    Attributes:
        file: path of the file that is being read.
        counts: number of troubles by reason.
        named: the file or page of each trouble. Records of an archive that are no pages are only counted.
    """

    def __init__(self) -> None:
        self.file = ""
        self.counts = Counter[str]()
        self.named: list[Skipped] = []

    def note(self, reason: str, page: str = "", remark: str = "") -> None:
        """Note trouble with a page, or with the file if the page is not known."""
        self.counts[reason] += 1
        if reason != NO_HTML:
            place = [f"in {escaped(self.file)}"] if page else []
            self.named.append(Skipped(page or escaped(self.file), reason, "; ".join([*place, *filter(None, [remark])])))


def _pages(pages: str, paths: tuple[str, ...], config: ExtractConfig, troubles: Troubles) -> Iterator[Found]:
    storage = Storage(pages)
    for path in paths:
        troubles.file = path
        try:
            if storage.filesystem.info(f"{storage.root}/{path}")["type"] != "file":  # a pipe would block the read
                raise FileNotFoundError("it is no regular file")
            file = storage.filesystem.open(f"{storage.root}/{path}", "rb")
        except (FileNotFoundError, PermissionError) as error:  # such as a broken link; other errors may be temporary
            troubles.note(NO_FILE, remark=error.strerror or str(error))
            continue
        with file:
            kind = kind_of(path)
            if kind == WARC:
                yield from read_warc(file, config, troubles)
            elif kind == WAT:
                yield from read_wat(file, config, troubles)
            else:
                name = quote(os.fsencode(path))
                url = f"{config.base_url.rstrip('/')}/{name}" if config.base_url else ""
                yield from read_html(file, path, url, config, troubles)


def _unique(output: Output, links: str, shards: tuple[str, ...], first: int, last: int) -> Counts:
    """Task: write the links of a range of keys, sorted by key. Each link keeps only its first occurrence."""
    unique: dict[str, tuple[str, ...]] = {}
    rows = 0
    for shard in shards:
        table = read_range(links, shard, first, last)
        rows += len(table)
        for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
            unique.setdefault(row[0], row)
    output.write_table(text_table(COLUMNS, [unique[url] for url in sorted(unique, key=key_of_text)]))
    repeated = {REPEATED: rows - len(unique)} if rows > len(unique) else {}
    return Counts(rows, len(unique), repeated)


def _is_url(base: str) -> bool:
    """Whether links can be joined to a base. If not, the base is ignored and absolute links still count."""
    try:
        urlsplit(base)
    except ValueError:
        return False
    return True


class Found(NamedTuple):
    """A page, its address, and what it asks of robots."""

    url: str
    page: Page
    robots: list[str]


def kind_of(path: str) -> tuple[str, ...] | None:
    """The kind of a file by its name: HTML, WARC or WAT; None for other files."""
    name = path.lower().removesuffix(COMPRESSED)
    return next((kind for kind in (WAT, WARC, HTML) if name.endswith(kind) or f"{kind[0]}." in name), None)


def read_html(file: IO[bytes], path: str, url: str, config: ExtractConfig, troubles: Troubles) -> Iterator[Found]:
    """Read the page of an HTML file, which may be compressed."""
    limit = config.max_page_bytes
    with gzip.GzipFile(fileobj=file) if path.lower().endswith(COMPRESSED) else file as opened:
        content, damaged = _read(opened.read, limit + 1, (gzip.BadGzipFile, EOFError, zlib.error))
    if damaged:
        troubles.note(DAMAGED)
    if len(content) > limit:
        troubles.note(TRUNCATED_PAGE)
    if page := _parsed(content[:limit], url, None, config, troubles):
        yield Found(url or page.base, page, page.robots)


def read_warc(file: IO[bytes], config: ExtractConfig, troubles: Troubles) -> Iterator[Found]:
    """Read the HTML pages among the responses of a WARC file. Damage counts once and ends the file."""
    limit = config.max_page_bytes
    for record in _records(file, "response", troubles):
        headers = record.http_headers
        kind = (record.http_content_type or "").lower() if headers is not None else ""
        if "Content-Length" not in record.headers:  # the file was cut off here
            troubles.note(DAMAGED)
            continue
        if "html" not in kind:  # such as a redirect, whose answer may have neither a type nor a body
            troubles.note(NO_HTML)
            continue
        body, damaged = _read(record.reader.read, limit + 1, (OSError,))
        damaged = damaged or len(body) < min(record.content_length, limit)  # the body was cut off
        named: dict[str, list[str]] = {}
        for name, value in headers.astuples():
            named.setdefault(name.lower(), []).append(value)
        transfer, encoding = (",".join(named.get(name, [])) for name in ("transfer-encoding", "content-encoding"))
        url = record.headers.get("WARC-Target-URI", "").strip("<>")  # some versions of Wget write <URL>
        try:
            content = plain_body(body, transfer, encoding, limit + 1)
        except UnknownEncodingError as error:
            troubles.note(UNKNOWN_ENCODING, url, str(error)[:20])
            content = b""
        if max(len(content), len(body)) > limit:
            troubles.note(TRUNCATED_PAGE, url)
        if damaged:
            troubles.note(DAMAGED)
        if page := _parsed(content[:limit], url, charset_in(",".join(named.get("content-type", []))), config, troubles):
            yield Found(url, page, [*page.robots, *named.get("x-robots-tag", [])])
        if damaged:
            return


def read_wat(file: IO[bytes], config: ExtractConfig, troubles: Troubles) -> Iterator[Found]:
    """Read the pages that a WAT file of Common Crawl describes. Their links are listed in JSON, as ``IMG@/src``."""
    for record in _records(file, "metadata", troubles):
        text, damaged = _read(record.reader.read, MAX_METADATA, (OSError,))
        try:
            found = _page_of_wat(json.loads(text)["Envelope"], config.agent)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # JSON of any other shape
            found = None
            if not damaged:
                troubles.note(NO_HTML)
        if found is not None:
            yield found
        if damaged:
            troubles.note(DAMAGED)
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
            robots += map(str, value) if isinstance(value, list) else [str(value)]  # a list: the header was sent twice
    return Found(url, Page(str(head.get("Base") or url), robots, list(links.values())), robots)


def _parsed(content: bytes, url: str, charset: str | None, config: ExtractConfig, troubles: Troubles) -> Page | None:
    try:
        return parse_page(content, url, charset, config.agent)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # any error of the parser on foreign bytes costs only this page
        troubles.note(UNREADABLE, url, str(error))
        return None


def _read(read: Callable[[int], bytes], size: int, damages: tuple[type[Exception], ...]) -> tuple[bytes, bool]:
    """Read ``size`` bytes, or fewer up to damage; also return whether there is damage."""
    parts, left = list[bytes](), size
    try:
        while left > 0 and (part := read(min(left, PIECE))):
            parts.append(part)
            left -= len(part)
    except damages:
        return b"".join(parts), True
    return b"".join(parts), False


def _records(file: IO[bytes], kind: str, troubles: Troubles) -> Iterator[Any]:
    """Records up to the first unreadable one. Its length is unknown, so the next record cannot be found."""
    warc = require("fastwarc.warc", extra="curate", purpose="reading WARC files")
    types = getattr(warc.WarcRecordType, kind)
    try:
        records = warc.ArchiveIterator(_Source(file), record_types=types, parse_http=kind == "response")
        while (record := next(records, None)) is not None:
            yield record
    except (ImportError, MemoryError, StorageError):
        raise
    except Exception:  # the parser raises any error on a damaged file
        troubles.note(DAMAGED)


class StorageError(Exception):
    """A file cannot be read now. Its content may be fine, so the task must be tried again."""


class _Source:
    """A file for FastWARC. It marks errors of the storage, because FastWARC raises errors of the same types."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            raise StorageError(f"{type(error).__name__}: {error}") from error

    def tell(self) -> int:
        return self._file.tell()
