"""The stage: links of every page, then each link once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dinov2.curate.domains import RefusedURLError, is_blocked, normal_url, read_domains
from dinov2.curate.extract.archives import HTML, WARC, WAT, Found, kind_of, read_html, read_warc, read_wat
from dinov2.curate.extract.config import ExtractConfig
from dinov2.curate.opt_out import opts_out
from dinov2.curate.pool import read_table
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

COLUMNS = ("url", "page", "alt", "attribute")
BLOCKED, OPTED_OUT, REPEATED = "blocked domain", "page opted out", "repeated link"
AGENT = "dinov2"


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
    found = [path for path in sorted(storage.filesystem.find(storage.root)) if kind_of(path)]
    if not found:
        raise ValueError(f"pages must be a folder of HTML, WARC or WAT files, but {pages!r} has none")
    paths = [path[len(storage.root) + 1 :] for path in found]
    documents = [path for path in paths if kind_of(path) == HTML]
    pieces = [
        tuple(documents[i : i + config.files_per_shard]) for i in range(0, len(documents), config.files_per_shard)
    ]
    pieces += [(path,) for path in paths if kind_of(path) != HTML]
    tasks = [Task(f"{number:05d}", _extract, (pages, piece, config)) for number, piece in enumerate(pieces)]
    listing = digest([[path, storage.filesystem.size(full)] for path, full in zip(paths, found, strict=True)])
    links = Step(output, "extract-links", [config, listing], (pages,), tasks, "links")
    yield links
    buckets = max(1, links.counts().rows_out // 100_000)
    tasks = [
        Task(f"{number:05d}", _unique, (links.folder, tuple(task.shard for task in links.tasks), number, buckets))
        for number in range(buckets)
    ]
    unique = Step(output, "extract-unique", buckets, (links.folder,), tasks, "links")
    yield unique
    return unique.folder


def _extract(output: Output, pages: str, paths: tuple[str, ...], config: ExtractConfig) -> Counts:
    """Task: the links in some files, with repetitions."""
    rows: list[tuple[str, str, str, str]] = []
    dropped, troubles, number_of_pages = Counter[str](), Counter[str](), 0
    blocked = read_domains(config.blocked_domains)
    for found in _pages(pages, paths, config, troubles):
        number_of_pages += 1
        silent = config.honour_opt_out and opts_out(found.robots, config.opt_out, AGENT)
        for link in found.page.links:
            try:
                url = normal_url(link.url, found.page.base)
            except RefusedURLError as error:
                dropped[error.reason] += 1
                continue
            if silent:
                dropped[OPTED_OUT] += 1
            elif is_blocked(url, blocked) or is_blocked(found.url, blocked):
                dropped[BLOCKED] += 1
            else:
                rows.append((url, found.url, link.alt, link.attribute))
    output.write_table(_table(rows))
    figures = {"pages": number_of_pages, **troubles}
    return Counts(len(rows) + dropped.total(), len(rows), dict(sorted(dropped.items())), dict(sorted(figures.items())))


def _pages(pages: str, paths: tuple[str, ...], config: ExtractConfig, troubles: Counter[str]) -> Iterator[Found]:
    storage = Storage(pages)
    for path in paths:
        with storage.filesystem.open(f"{storage.root}/{path}", "rb") as file:
            if kind_of(path) == HTML:
                url = f"{config.base_url.rstrip('/')}/{path}" if config.base_url else ""
                yield from read_html(file, path, url, config, troubles)
            else:
                assert kind_of(path) in (WARC, WAT)
                yield from (read_warc if kind_of(path) == WARC else read_wat)(file, config, troubles)


def _unique(output: Output, links: str, shards: tuple[str, ...], bucket: int, buckets: int) -> Counts:
    """Task: each link of one bucket once, as it stood where it came first; in the order of their hashes."""
    first: dict[str, tuple[str, str, str, str]] = {}
    rows = 0
    for shard in shards:
        table = read_table(links, shard)
        for row in zip(*(table[name].to_pylist() for name in COLUMNS), strict=True):
            key = hashlib.sha256(row[0].encode()).hexdigest()
            if int(key[:8], 16) % buckets == bucket:
                rows += 1
                first.setdefault(key, row)
    unique = [first[key] for key in sorted(first)]
    output.write_table(_table(unique))
    repeated = {REPEATED: rows - len(unique)} if rows > len(unique) else {}
    return Counts(rows, len(unique), repeated)


def _table(rows: list[tuple[str, str, str, str]]) -> Any:
    arrow = require("pyarrow", extra="curate", purpose="curation")
    return arrow.table({name: arrow.array([row[i] for row in rows], arrow.string()) for i, name in enumerate(COLUMNS)})
