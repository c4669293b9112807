"""The download stage: shares out links to tasks host by host; each task fetches its links."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2.configuration import AtLeast0, Config, Count, CountOr0, Positive, Rules
from dinov2.curate.collect import key_of
from dinov2.curate.fetching import Fetched, Fetcher
from dinov2.curate.pool import Pool, Skipped, read_table, write_skipped
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.curate.web import RefusedURLError, host_of, normal_url
from dinov2.data.shards import ShardImage, write_shard
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

UNDER_WAY = 4  # a task has this many times its concurrency of links in memory


@dataclass(frozen=True)
class DownloadConfig(Config, at="download"):
    """The download stage fetches links politely. Limits on a host hold within a task; all links of a host are
    in one task if they fit."""

    agent: str = "dinov2-curate"
    """This is our name as a robot, in User-Agent and robots.txt."""
    contact: str = ""
    """Owners of servers can complain here: give your page or address."""
    links_per_shard: Count = 10_000
    """A task fetches this many links and makes one tar."""
    concurrency: Count = 64
    """A task sends this many requests at once."""
    per_host: Count = 2
    """A host gets at most this many requests at once."""
    delay: AtLeast0 = 0.1
    """Wait this many seconds between two requests to a host, or longer if its robots.txt asks for a Crawl-delay."""
    tries: Count = 3
    """Try a link this often if the failure may pass: no answer, too many requests, an error of the server."""
    backoff: AtLeast0 = 1.0
    """Wait this many seconds before the second try, and twice as long before each further one."""
    max_wait: AtLeast0 = 60.0
    """Wait at most this many seconds, whatever a server's Retry-After or Crawl-delay says."""
    connect_timeout: Positive = 10.0
    """A connection must be there within this many seconds."""
    timeout: Positive = 60.0
    """A try must end within this many seconds."""
    max_bytes: Count = 20_000_000
    """Give up a file that has more bytes than this."""
    max_pixels: Count = 100_000_000
    """Leave out images whose header names more pixels than this."""
    min_side: Count = 32
    """Leave out images whose shorter side has fewer pixels; icons and tracking pixels have."""
    max_redirects: CountOr0 = 5
    """Follow at most this many redirects of a link. Each is checked like the link itself."""
    robots: bool = True
    """Obey robots.txt."""
    honour_opt_out: bool = True
    """Leave out images whose X-Robots-Tag asks so."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    """The tag asks by these words."""
    blocked_domains: str = ""
    """This file or URL lists domains, one a line. Nothing is fetched from them, not even after a redirect."""
    allow_private_addresses: bool = False
    """Fetch from this machine and private networks too. Tests and crawls of an own network need it."""

    def rules(self) -> Rules:
        """Agent and contact must fit into a header."""
        is_name = bool(self.agent) and self.agent.isascii() and "\n" not in self.agent
        yield "agent", is_name, "a name in ASCII"
        yield "contact", "\n" not in self.contact, "one line"

    @property
    def user_agent(self) -> str:
        """The User-Agent header that servers get."""
        from dinov2_kernels._version import __version__

        return f"{self.agent}/{__version__}" + (f" (+{self.contact})" if self.contact else "")


def download(links: str, config: DownloadConfig, output: str) -> Steps[Pool]:
    """Fetch images from links into tar shards.

    Args:
        links: folder or URL of Parquet tables with a column url. Columns page and alt are optional and go into the
            index.
        config: limits, and how politely links are fetched.
        output: folder or URL of the whole curation.

    Returns:
        The pool. Each shard also has a table of all its links: url, host, reason (null if there is an image), tries,
        bytes, remark.

    Raises:
        ValueError: there are no links, or a file is no table of links.
    """
    storage = Storage(links)
    tables = storage.files("", ".parquet")
    if not tables:
        raise ValueError(f"links: expected a folder of Parquet tables, got {links!r}, which has none")
    for path in tables.values():
        _check_columns(storage, path)
    listing = digest({name: storage.filesystem.size(path) for name, path in tables.items()})
    task = Task("all", _plan, (links, config.links_per_shard))
    plan = Step(output, "download-plan", [config.links_per_shard, listing], (links,), [task], "links", version=2)
    yield plan
    shards = plan.counts().figures["shards"]
    tasks = [Task(f"{number:05d}", _download, (plan.folder, config)) for number in range(shards)]
    images = Step(output, "download-images", config, (plan.folder,), tasks, "links", version=2)
    yield images
    return Pool(images.folder)


def _plan(output: Output, links: str, links_per_shard: int) -> Counts:
    """Task: write ``all.SHARD.parquet`` with the links of each shard, and the table of refused links.

    All links of a host go into one shard; hosts are sorted by the hashes of their names. A host with more links than a
    shard holds continues in the next shard. Links of a shard are sorted by their hashes, so that hosts take turns.
    """
    by_host: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    dropped, skipped, rows = Counter[str](), list[Skipped](), 0
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
                skipped.append(Skipped(link or "", error.reason, ""))
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
    write_skipped(output, skipped)
    total = sum(map(len, shards))
    return Counts(rows, total, dict(sorted(dropped.items())), {"hosts": len(by_host), "shards": len(shards)})


def _check_columns(storage: Storage, path: str) -> None:
    """Check by its end that a file is a table with a column url."""
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    expected = f"links: expected Parquet tables with a column url, got {path}"
    try:
        with storage.filesystem.open(path, "rb") as file:
            names = parquet.read_schema(file).names
    except ValueError as error:  # of Arrow
        raise ValueError(f"{expected}, which cannot be read: {error}") from error
    if "url" not in names:
        raise ValueError(f"{expected} with {', '.join(names)}")


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
            "remark": arrow.array([result.remark or None for result in results], arrow.string()),
        }
    )
    dropped = Counter(result.reason for result in results if result.reason is not None)
    return Counts(len(urls), report.images, dict(sorted(dropped.items())), {"bytes": sum(sizes)})


async def _fetch_all(urls: list[str], config: DownloadConfig, folder: Path) -> list[Fetched]:
    """Fetch each link into a file named by its number. The results have no contents."""
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
