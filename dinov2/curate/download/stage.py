"""The stage: links are dealt out to tasks host by host, and each task fetches its own."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinov2.curate.collect.stage import key_of
from dinov2.curate.domains import RefusedURLError, host_of, normal_url
from dinov2.curate.download.config import DownloadConfig
from dinov2.curate.download.fetch import Fetched, Fetcher
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.data.shards import ShardImage, write_shard
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

UNDER_WAY = 4  # links of a task in memory, times its concurrency


def download(links: str, config: DownloadConfig, output: str) -> Steps[Pool]:
    """Fetch images from links into tar shards.

    Args:
        links: folder or URL of Parquet tables with a column url; page and alt, if there are such, go into the index.
        config: limits and manners.
        output: folder or URL of the whole curation.

    Returns:
        The pool. Beside its tars lies a table for each shard, of all its links: url, host, reason (null where there is
        an image), tries, bytes.

    Raises:
        ValueError: there are no links.
    """
    storage = Storage(links)
    tables = storage.files("", ".parquet")
    if not tables:
        raise ValueError(f"links must be a folder of Parquet tables, but {links!r} has none")
    listing = digest({name: storage.filesystem.size(path) for name, path in tables.items()})
    task = Task("all", _plan, (links, config.links_per_shard))
    plan = Step(output, "download-plan", [config.links_per_shard, listing], (links,), [task], "links")
    yield plan
    shards = plan.counts().figures["shards"]
    tasks = [Task(f"{number:05d}", _download, (plan.folder, config)) for number in range(shards)]
    images = Step(output, "download-images", config, (plan.folder,), tasks, "links")
    yield images
    return Pool(images.folder)


def _plan(output: Output, links: str, links_per_shard: int) -> Counts:
    """Task: write ``all.SHARD.parquet`` with the links of each shard.

    Hosts are dealt out whole, in the order of the hashes of their names; one with more links than a shard holds goes
    on in the next. Within a shard, links are in the order of their hashes, so that hosts take turns.
    """
    by_host: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    dropped, rows = Counter[str](), 0
    for shard in Storage(links).files("", ".parquet"):
        table = read_table(links, shard)
        columns = [
            table[name].to_pylist() if name in table.column_names else [""] * len(table) for name in ("page", "alt")
        ]
        for link, page, alt in zip(table["url"].to_pylist(), *columns, strict=True):
            rows += 1
            try:
                url = normal_url(link or "")
            except RefusedURLError as error:
                dropped[error.reason] += 1
                continue
            if url in by_host[host_of(url)]:
                dropped["repeated link"] += 1
            by_host[host_of(url)].setdefault(url, (page or "", alt or ""))
    shards: list[list[tuple[str, str, str]]] = [[]]
    for host in sorted(by_host, key=_hash):
        entries = [(url, *by_host[host][url]) for url in sorted(by_host[host], key=_hash)]
        if shards[-1] and len(shards[-1]) + len(entries) > links_per_shard:
            shards.append([])
        for start in range(0, len(entries), links_per_shard):
            piece = entries[start : start + links_per_shard]
            if len(shards[-1]) + len(piece) > links_per_shard:
                shards.append([])
            shards[-1] += piece
    shards = [shard for shard in shards if shard]
    for number, entries in enumerate(shards):
        entries.sort(key=lambda entry: _hash(entry[0]))
        _write_table(output, f".{number:05d}.parquet", entries)
    total = sum(map(len, shards))
    return Counts(rows, total, dict(sorted(dropped.items())), {"hosts": len(by_host), "shards": len(shards)})


def _download(output: Output, plan: str, config: DownloadConfig) -> Counts:
    """Task: fetch the links of a shard."""
    table = read_table(plan, f"all.{output.shard}")
    urls, pages, alts = (table[name].to_pylist() for name in ("url", "page", "alt"))
    with tempfile.TemporaryDirectory(prefix="dinov2-download-") as folder:
        results = asyncio.run(_fetch_all(urls, config, Path(folder)))

        def images() -> Iterator[ShardImage]:
            for number, (url, page, alt) in enumerate(zip(urls, pages, alts, strict=True)):
                file = Path(folder) / str(number)
                if file.exists():
                    yield ShardImage(key_of(url), file.read_bytes(), {"url": url, "page": page, "alt": alt})

        report = write_shard(images(), output.folder, int(output.shard))
        sizes = [
            (Path(folder) / str(n)).stat().st_size if result.reason is None else 0 for n, result in enumerate(results)
        ]
    arrow = require("pyarrow", extra="curate", purpose="curation")
    output.write_table(
        {
            "url": urls,
            "host": [host_of(url) for url in urls],
            "reason": arrow.array([result.reason for result in results], arrow.string()),
            "tries": [result.tries for result in results],
            "bytes": sizes,
        }
    )
    dropped = Counter(result.reason for result in results if result.reason is not None)
    return Counts(len(urls), report.images, dict(sorted(dropped.items())), {"bytes": sum(sizes)})


async def _fetch_all(urls: list[str], config: DownloadConfig, folder: Path) -> list[Fetched]:
    """Fetch links, each into the file of its number; the results are without their contents."""
    room = asyncio.Semaphore(UNDER_WAY * config.concurrency)

    async def one(fetcher: Fetcher, number: int) -> Fetched:
        async with room:
            result = await fetcher.fetch(urls[number])
            if result.content is not None:
                (folder / str(number)).write_bytes(result.content)
            return result._replace(content=None)

    async with Fetcher(config) as fetcher:
        return list(await asyncio.gather(*(one(fetcher, number) for number in range(len(urls)))))


def _write_table(output: Output, suffix: str, rows: list[tuple[str, str, str]]) -> None:
    arrow = require("pyarrow", extra="curate", purpose="curation")
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    columns: dict[str, Any] = {
        name: arrow.array([row[number] for row in rows], arrow.string())
        for number, name in enumerate(("url", "page", "alt"))
    }
    with output.replace(suffix) as file:
        parquet.write_table(arrow.table(columns), file)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
