"""The fetching of single links: limits, politeness, tries, and a true reason for each link that gives no image."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import defaultdict
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from dinov2.curate.bodies import Inflater
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
from dinov2.data.remarks import LENGTH, plain
from dinov2.extras import require

if TYPE_CHECKING:
    from dinov2.curate.download import DownloadConfig

REDIRECTS = frozenset({301, 302, 303, 307, 308})
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
CHUNK = 65_536

LOOP, ROBOTS, OPT_OUT = "too many redirects", "robots.txt", "opted out"
TOO_LARGE, NO_IMAGE, PIXELS, SMALL = "too large", "no image", "too many pixels", "too small"
MALFORMED, TRUNCATED, ENCODING = "malformed answer", "truncated", "damaged encoding"
UNKNOWN_HOST, NO_CONNECTION, INSECURE = "unknown host", "no connection", "no secure connection"
TIMEOUT, PRIVATE, BLOCKED = "timeout", "private address", "blocked domain"
OF_HOST = frozenset({UNKNOWN_HOST, NO_CONNECTION, INSECURE, TIMEOUT, PRIVATE, BLOCKED})
"""Reasons for which a host gives nothing at all, be it an image or robots.txt."""


class Fetched(NamedTuple):
    """The result of a link.

    Attributes:
        content: bytes of the file; None if the link failed.
        reason: why the link failed; None if there is a file.
        tries: number of tries.
        remark: more words about the failure, such as the system's or the decoder's.
    """

    content: bytes | None
    reason: str | None
    tries: int
    remark: str = ""


class _FailedError(Exception):
    def __init__(self, reason: str, remark: str = "", wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remark = remark
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
                    return Fetched(None, plain(failure.reason), tries, plain(failure.remark)[:LENGTH])
                await asyncio.sleep(min(max(wait, failure.wait), self._config.max_wait))
                wait *= 2
        raise AssertionError

    async def _follow(self, link: str) -> bytes:
        """Fetch the bytes at a URL through redirects. Each redirect is checked like the first URL."""
        url = link
        try:
            for _ in range(self._config.max_redirects + 1):
                self._check_url(url)
                if self._config.robots:
                    if (refusal := await self._robots.refusal(url)) is not None:
                        raise _FailedError(*refusal)
                    self._delays[host_of(url)] = min(await self._robots.delay(url), self._config.max_wait)
                answer = await self._get(url, self._config.max_bytes)
                if isinstance(answer, bytes):
                    return answer
                try:
                    url = normal_url(answer.location, url)
                except RefusedURLError as error:
                    raise _FailedError(f"redirect: {error.reason}", answer.location) from None
        except _FailedError as failure:
            if url != link:
                failure.remark = f"redirected to {url}" + (f"; {failure.remark}" if failure.remark else "")
            raise
        raise _FailedError(LOOP, f"the last one leads to {url}")

    def _check_url(self, url: str) -> None:
        if is_blocked(url, self._blocked):
            raise _FailedError(BLOCKED)
        if not self._config.allow_private_addresses:
            try:
                check_literal(url)
            except PrivateAddressError as error:
                raise _FailedError(PRIVATE, str(error)) from None

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
                        raise _FailedError(f"HTTP {response.status}", response.reason or "", wait)
                    tags = response.headers.getall("X-Robots-Tag", [])
                    opt_out = self._config.honour_opt_out and not is_robots
                    if opt_out and opts_out(tags, self._config.opt_out, self._config.agent):
                        raise _FailedError(OPT_OUT, f"X-Robots-Tag: {', '.join(tags)}")
                    return await _body(response, limit, cut=is_robots)
        except asyncio.TimeoutError as error:
            words = str(error) or f"no whole answer within {self._config.timeout:g} seconds"
            raise _FailedError(TIMEOUT, words, 0) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason, wait = self._reason(error)
            raise _FailedError(reason, str(error) or type(error).__name__, wait) from None

    def _reason(self, error: Exception) -> tuple[str, float | None]:
        """The reason for an error of a request, and the seconds until a new try may help."""
        aiohttp = self._aiohttp
        cause = error.__cause__
        if isinstance(error, aiohttp.ClientPayloadError):
            return TRUNCATED, 0
        if isinstance(error, aiohttp.ClientSSLError):
            return INSECURE, None if isinstance(error, aiohttp.ClientConnectorCertificateError) else 0
        if isinstance(error, PrivateAddressError) or isinstance(cause, PrivateAddressError):
            return PRIVATE, None
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return UNKNOWN_HOST, 0
        if isinstance(error, aiohttp.ClientResponseError):
            return MALFORMED, None
        if isinstance(error, ValueError) and not isinstance(error, OSError):  # aiohttp's own rules, beyond ours
            return "malformed URL", None
        return NO_CONNECTION, 0

    async def _wait_for_turn(self, host: str) -> None:
        now = time.monotonic()
        turn = max(self._next[host], now)
        self._next[host] = turn + max(self._config.delay, self._delays.get(host, 0))
        await asyncio.sleep(turn - now)

    async def _robots_file(self, first: str) -> RobotsFile:
        url = first
        try:
            for _ in range(self._config.max_redirects + 1):
                self._check_url(url)
                answer = await self._get(url, ROBOTS_BYTES, is_robots=True)
                if isinstance(answer, bytes):
                    return RobotsFile(200, answer)
                url = normal_url(answer.location, url)
        except _FailedError as failure:
            status = failure.reason.removeprefix("HTTP ")
            same = failure.reason in OF_HOST and host_of(url) == host_of(first)
            reason = failure.reason if same else f"{ROBOTS}: {failure.reason}"
            return RobotsFile(int(status) if status.isdigit() else 0, b"", reason, failure.remark)
        except RefusedURLError:
            pass
        return RobotsFile(404, b"")  # RFC 9309: after five redirects a robots.txt counts as missing

    def _check_image(self, content: bytes) -> None:
        try:
            header = read_header(content, "")
        except UnreadableImageError as error:
            raise _FailedError(NO_IMAGE, error.words if content else "the answer is empty") from None
        size = f"{header.width} x {header.height} pixels"
        if header.width * header.height > self._config.max_pixels:
            raise _FailedError(PIXELS, size)
        if min(header.width, header.height) < self._config.min_side:
            raise _FailedError(SMALL, size)


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
        except zlib.error as error:
            raise _FailedError(ENCODING, f"{encoding}: {error}", 0) from None
        if len(body) > limit:
            if cut:
                return bytes(body[:limit])
            raise _FailedError(TOO_LARGE, f"more than {limit:,} bytes")
    if inflate is not None and not inflate.complete:
        raise _FailedError(TRUNCATED, f"{encoding} ends too early", 0)
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
