"""The download stage: shares out links to tasks host by host; each task fetches its links."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from dinov2.configuration import AtLeast0, Config, Count, CountOr0, Positive, Rules
from dinov2.curate.bodies import Inflater
from dinov2.curate.collect import key_of
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.curate.web import (
    ROBOTS_BYTES,
    PrivateAddressError,
    RefusedURLError,
    Robots,
    RobotsFile,
    check_literal,
    host_of,
    is_blocked,
    normal_url,
    opts_out,
    public_resolver,
    read_domains,
)
from dinov2.data.decoding import UnreadableImageError, read_header
from dinov2.data.shards import ShardImage, write_shard
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

UNDER_WAY = 4  # a task has this many times its concurrency of links in memory
REDIRECTS = frozenset({301, 302, 303, 307, 308})
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
CHUNK = 65_536

PRIVATE, LOOP, ROBOTS, OPT_OUT = "private address", "too many redirects", "robots.txt", "opted out"
TOO_LARGE, NO_IMAGE, PIXELS, SMALL = "too large", "no image", "too many pixels", "too small"
TIMEOUT, NO_CONNECTION, TRUNCATED, BLOCKED = "timeout", "no connection", "truncated", "blocked domain"


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
        bytes.

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
    plan = Step(output, "download-plan", [config.links_per_shard, listing], (links,), [task], "links")
    yield plan
    shards = plan.counts().figures["shards"]
    tasks = [Task(f"{number:05d}", _download, (plan.folder, config)) for number in range(shards)]
    images = Step(output, "download-images", config, (plan.folder,), tasks, "links")
    yield images
    return Pool(images.folder)


def _plan(output: Output, links: str, links_per_shard: int) -> Counts:
    """Task: write ``all.SHARD.parquet`` with the links of each shard.

    All links of a host go into one shard; hosts are sorted by the hashes of their names. A host with more links than a
    shard holds continues in the next shard. Links of a shard are sorted by their hashes, so that hosts take turns.
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


class Fetched(NamedTuple):
    """The result of a link.

    Attributes:
        content: bytes of the file; None if the link failed.
        reason: why the link failed; None if there is a file.
        tries: number of tries.
    """

    content: bytes | None
    reason: str | None
    tries: int


class _FailedError(Exception):
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait  # seconds until a new try may help; None if no try will help


class Fetcher:
    """A client for one task; used as an asynchronous context manager.

    Args:
        config: limits, and how politely links are fetched.
        resolver: an aiohttp resolver of names; the system's by default. Its answers are checked.
    """

    def __init__(self, config: DownloadConfig, resolver: Any = None) -> None:
        self._aiohttp = require("aiohttp", extra="curate", purpose="downloading")
        self._config = config
        self._resolver = resolver
        self._blocked = read_domains(config.blocked_domains)
        self._robots = Robots(self._robots_file, config.agent)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._hosts: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(config.per_host))
        self._next: dict[str, float] = defaultdict(float)
        self._delays: dict[str, float] = {}

    async def __aenter__(self) -> Fetcher:
        aiohttp, config = self._aiohttp, self._config
        resolver = self._resolver or aiohttp.ThreadedResolver()
        connector = aiohttp.TCPConnector(
            limit=0, resolver=resolver if config.allow_private_addresses else public_resolver(resolver)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=config.timeout, sock_connect=config.connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Fetched:
        """Fetch the image at a normal URL."""
        wait = self._config.backoff
        for tries in range(1, self._config.tries + 1):
            try:
                content = await self._follow(url)
                self._check_image(content)
                return Fetched(content, None, tries)
            except _FailedError as failure:
                if failure.wait is None or tries == self._config.tries:
                    return Fetched(None, failure.reason, tries)
                await asyncio.sleep(min(max(wait, failure.wait), self._config.max_wait))
                wait *= 2
        raise AssertionError

    async def _follow(self, url: str) -> bytes:
        """Fetch the bytes at a URL through redirects. Each redirect is checked like the first URL."""
        for _ in range(self._config.max_redirects + 1):
            self._check_url(url)
            if self._config.robots:
                if not await self._robots.allows(url):
                    raise _FailedError(ROBOTS)
                self._delays[host_of(url)] = min(await self._robots.delay(url), self._config.max_wait)
            answer = await self._get(url, self._config.max_bytes)
            if isinstance(answer, bytes):
                return answer
            try:
                url = normal_url(answer.location, url)
            except RefusedURLError as error:
                raise _FailedError(f"redirect: {error.reason}") from None
        raise _FailedError(LOOP)

    def _check_url(self, url: str) -> None:
        if is_blocked(url, self._blocked):
            raise _FailedError(BLOCKED)
        if not self._config.allow_private_addresses:
            try:
                check_literal(url)
            except PrivateAddressError:
                raise _FailedError(PRIVATE) from None

    async def _get(self, url: str, limit: int, is_robots: bool = False) -> bytes | _Redirect:
        """Send one request. A failure says whether a new try may help.

        If a robots.txt is too large, its beginning counts (RFC 9309). Its own X-Robots-Tag does not count.
        """
        aiohttp = self._aiohttp
        host = host_of(url)
        try:
            async with self._hosts[host]:
                await self._wait_for_turn(host)
                async with self._slots, self._session.get(url, allow_redirects=False) as response:
                    if response.status in REDIRECTS and "Location" in response.headers:
                        return _Redirect(response.headers["Location"])
                    if response.status != 200:
                        wait = _retry_after(response.headers) if response.status in PASSING else None
                        raise _FailedError(f"HTTP {response.status}", wait)
                    tags = response.headers.getall("X-Robots-Tag", [])
                    opt_out = self._config.honour_opt_out and not is_robots
                    if opt_out and opts_out(tags, self._config.opt_out, self._config.agent):
                        raise _FailedError(OPT_OUT)
                    return await _body(response, limit, cut=is_robots)
        except asyncio.TimeoutError:
            raise _FailedError(TIMEOUT, 0) from None
        except aiohttp.ClientPayloadError:
            raise _FailedError(TRUNCATED, 0) from None
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, PrivateAddressError):
                raise _FailedError(PRIVATE) from None
            raise _FailedError(NO_CONNECTION, 0) from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise _FailedError(NO_CONNECTION, 0) from None

    async def _wait_for_turn(self, host: str) -> None:
        now = time.monotonic()
        turn = max(self._next[host], now)
        self._next[host] = turn + max(self._config.delay, self._delays.get(host, 0))
        await asyncio.sleep(turn - now)

    async def _robots_file(self, url: str) -> RobotsFile:
        try:
            for _ in range(self._config.max_redirects + 1):
                self._check_url(url)
                answer = await self._get(url, ROBOTS_BYTES, is_robots=True)
                if isinstance(answer, bytes):
                    return RobotsFile(200, answer)
                url = normal_url(answer.location, url)
        except _FailedError as failure:
            status = failure.reason.removeprefix("HTTP ")
            return RobotsFile(int(status) if status.isdigit() else 0, b"")
        except RefusedURLError:
            pass
        return RobotsFile(404, b"")  # RFC 9309: after five redirects a robots.txt counts as missing

    def _check_image(self, content: bytes) -> None:
        try:
            header = read_header(content, "")
        except UnreadableImageError:
            raise _FailedError(NO_IMAGE) from None
        if header.width * header.height > self._config.max_pixels:
            raise _FailedError(PIXELS)
        if min(header.width, header.height) < self._config.min_side:
            raise _FailedError(SMALL)


class _Redirect(NamedTuple):
    location: str


async def _body(response: Any, limit: int, cut: bool) -> bytes:
    """Read the body of a response, and decompress it if the server compressed it without being asked.

    At most ``limit`` bytes are read. A longer body fails, or is cut off if ``cut``.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise _FailedError(f"encoding {encoding[:20]}")
    inflate = None if encoding in ("", "identity") else Inflater()
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK):
        try:
            body += chunk if inflate is None else inflate(chunk, limit - len(body) + 1)
        except zlib.error:
            raise _FailedError(TRUNCATED, 0) from None
        if len(body) > limit:
            if cut:
                return bytes(body[:limit])
            raise _FailedError(TOO_LARGE)
    if inflate is not None and not inflate.complete:
        raise _FailedError(TRUNCATED, 0)
    return bytes(body)


def _retry_after(headers: Any) -> float:
    """The seconds that Retry-After asks to wait. The header holds a number or a date."""
    value = headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    now = datetime.now(timezone.utc)
    return max((at.replace(tzinfo=at.tzinfo or timezone.utc) - now).total_seconds(), 0.0)
