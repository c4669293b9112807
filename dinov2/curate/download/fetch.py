"""One link after the other, many at once: what a server gives for it, or why there is nothing."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import defaultdict
from typing import Any, NamedTuple

from dinov2.curate.domains import RefusedURLError, host_of, is_blocked, normal_url, read_domains
from dinov2.curate.download.addresses import PrivateAddressError, check_literal, public_resolver
from dinov2.curate.download.config import DownloadConfig
from dinov2.curate.download.robots import MAX_BYTES as ROBOTS_BYTES
from dinov2.curate.download.robots import Robots, RobotsFile
from dinov2.curate.opt_out import opts_out
from dinov2.data.decoding import UnreadableImageError, read_header
from dinov2_kernels._extras import require

REDIRECTS = frozenset({301, 302, 303, 307, 308})
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
CHUNK = 65_536

PRIVATE, LOOP, ROBOTS, OPT_OUT = "private address", "too many redirects", "robots.txt", "opted out"
TOO_LARGE, NO_IMAGE, PIXELS, SMALL = "too large", "no image", "too many pixels", "too small"
TIMEOUT, NO_CONNECTION, TRUNCATED, BLOCKED = "timeout", "no connection", "truncated", "blocked domain"


class Fetched(NamedTuple):
    """What became of a link.

    Attributes:
        content: the file; None where there is none.
        reason: why there is none; None where there is one.
        tries: how many there were.
    """

    content: bytes | None
    reason: str | None
    tries: int


class _FailedError(Exception):
    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait  # seconds before it may have passed; None where it will not


class Fetcher:
    """A client for one task; used as an asynchronous context manager.

    Args:
        config: limits and manners.
        resolver: of names, as aiohttp has them; the system's by default. Its answers are checked.
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
        """The image at a normal URL."""
        wait = self._config.backoff
        for tries in range(1, self._config.tries + 1):
            try:
                async with self._slots:
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
        """The bytes at a URL, through redirects, each of which is checked like the first."""
        for _ in range(self._config.max_redirects + 1):
            self._check_url(url)
            if self._config.robots and not await self._robots.allows(url):
                raise _FailedError(ROBOTS)
            answer = await self._get(url, self._config.max_bytes, self._config.honour_opt_out)
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

    async def _get(self, url: str, limit: int, honour_opt_out: bool) -> bytes | _Redirect:
        """One request. Its failures are told apart by whether trying again may help."""
        aiohttp = self._aiohttp
        host = host_of(url)
        try:
            async with self._hosts[host]:
                await self._wait_for_turn(host)
                async with self._session.get(url, allow_redirects=False) as response:
                    if response.status in REDIRECTS and "Location" in response.headers:
                        return _Redirect(response.headers["Location"])
                    if response.status != 200:
                        wait = _retry_after(response.headers) if response.status in PASSING else None
                        raise _FailedError(f"HTTP {response.status}", wait)
                    tags = response.headers.getall("X-Robots-Tag", [])
                    if honour_opt_out and opts_out(tags, self._config.opt_out, self._config.agent):
                        raise _FailedError(OPT_OUT)
                    return await _body(response, limit)
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
        self._next[host] = turn + self._config.delay
        await asyncio.sleep(turn - now)

    async def _robots_file(self, url: str) -> RobotsFile:
        try:
            for _ in range(self._config.max_redirects + 1):
                self._check_url(url)
                answer = await self._get(url, ROBOTS_BYTES, honour_opt_out=False)
                if isinstance(answer, bytes):
                    return RobotsFile(200, answer)
                url = normal_url(answer.location, url)
        except _FailedError as failure:
            status = failure.reason.removeprefix("HTTP ")
            return RobotsFile(int(status) if status.isdigit() else 0, b"")
        except RefusedURLError:
            pass
        return RobotsFile(404, b"")  # RFC 9309: after five redirects there is none

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


async def _body(response: Any, limit: int) -> bytes:
    """The body of a response, decompressed where a server did what was not asked of it, never more than the limit."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise _FailedError(f"encoding {encoding[:20]}")
    inflate = zlib.decompressobj(47 if "gzip" in encoding else 15) if encoding not in ("", "identity") else None
    parts, size = [], 0
    async for chunk in response.content.iter_chunked(CHUNK):
        if inflate is not None:
            try:
                chunk = inflate.decompress(chunk, limit - size + 1)
            except zlib.error:
                raise _FailedError(TRUNCATED, 0) from None
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _FailedError(TOO_LARGE)
    return b"".join(parts)


def _retry_after(headers: Any) -> float:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0
