"""The stage: links of every page, then each link once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote, urlsplit

from dinov2.curate.domains import RefusedURLError, is_blocked, normal_url, read_domains
from dinov2.curate.extract import archives
from dinov2.curate.extract.archives import HTML, Found, kind_of, read_html, read_warc, read_wat
from dinov2.curate.extract.config import ExtractConfig
from dinov2.curate.opt_out import opts_out
from dinov2.curate.sorted_tables import key_of_text, key_ranges, read_range, text_table, write_sorted
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.data.shards.storage import Storage

COLUMNS = ("url", "page", "alt", "attribute")
BLOCKED, OPTED_OUT, REPEATED = "blocked domain", "page opted out", "repeated link"
NO_FILE = "cannot be opened"
PER_BUCKET = 100_000  # links that a task compares


def extract(pages: str, config: ExtractConfig, output: str) -> Steps[str]:
    """Links to images in pages.

    Args:
        pages: folder or URL of files ``.html``, ``.warc`` and ``.wat``, of any nesting, each also with ``.gz``.
        config: which links are taken.
        output: folder or URL of the whole curation.

    Returns:
        Folder of tables with the columns url, page, alt and attribute, in which no URL is twice.

    Raises:
        ValueError: there are no such files.
    """
    storage = Storage(pages)
    found = storage.filesystem.find(storage.root, detail=True)
    sizes = {path[len(storage.root) + 1 :]: found[path]["size"] for path in sorted(found) if kind_of(path)}
    if not sizes:
        raise ValueError(f"pages must be a folder of HTML, WARC or WAT files, but {pages!r} has none")
    documents = [path for path in sizes if kind_of(path) == HTML]
    pieces = [
        tuple(documents[i : i + config.files_per_shard]) for i in range(0, len(documents), config.files_per_shard)
    ]
    pieces += [(path,) for path in sizes if kind_of(path) != HTML]
    tasks = [Task(f"{number:05d}", _extract, (pages, piece, config)) for number, piece in enumerate(pieces)]
    lists = [sorted(read_domains(path)) for path in (config.blocked_domains, config.allowed_domains)]
    settings = [config, digest(lists), digest([[_text(path), size] for path, size in sizes.items()])]
    links = Step(output, "extract-links", settings, (pages,), tasks, "links")
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
    """Task: the links in some files, each once, as it stood where it came first; in the order of their keys."""
    links: dict[str, tuple[str, str, str, str]] = {}
    dropped, troubles, number_of_pages, seen = Counter[str](), Counter[str](), 0, 0
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
    figures = {"pages": number_of_pages, **+troubles}
    return Counts(seen, len(rows), dict(sorted(dropped.items())), dict(sorted(figures.items())))


def _pages(pages: str, paths: tuple[str, ...], config: ExtractConfig, troubles: Counter[str]) -> Iterator[Found]:
    storage = Storage(pages)
    for path in paths:
        try:
            if storage.filesystem.info(f"{storage.root}/{path}")["type"] != "file":  # a pipe: nobody would write
                raise FileNotFoundError
            file = storage.filesystem.open(f"{storage.root}/{path}", "rb")
        except (FileNotFoundError, PermissionError):  # such as a broken link; other errors may pass
            troubles[NO_FILE] += 1
            continue
        with file:
            match kind_of(path):
                case archives.WARC:
                    yield from read_warc(file, config, troubles)
                case archives.WAT:
                    yield from read_wat(file, config, troubles)
                case _:
                    name = quote(os.fsencode(path))
                    url = f"{config.base_url.rstrip('/')}/{name}" if config.base_url else ""
                    yield from read_html(file, path, url, config, troubles)


def _unique(output: Output, links: str, shards: tuple[str, ...], first: int, last: int) -> Counts:
    """Task: each link of a range of keys once, as it stood where it came first; in the order of their keys."""
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
    """Whether a link can be joined to it; those that stand alone are none the worse for a page that says nonsense."""
    try:
        urlsplit(base)
    except ValueError:
        return False
    return True


def _text(path: str) -> str:
    """A path that JSON can hold, though it may be no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
