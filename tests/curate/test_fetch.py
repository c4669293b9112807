"""What becomes of a link at servers that do everything wrong, and at addresses that are nobody's business."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import aiohttp
import pytest

from dinov2.curate.download import DownloadConfig
from dinov2.curate.fetching import Fetched, Fetcher, _retry_after
from dinov2.curate.web import is_public, normal_url
from tests.curate.misbehaving import Server, serving

QUICK = DownloadConfig(
    delay=0,
    backoff=0.01,
    max_wait=0.05,
    timeout=1.0,
    connect_timeout=1.0,
    max_bytes=1_000_000,
    allow_private_addresses=True,
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def fetch_with_remark(url: str, config: DownloadConfig = QUICK, resolver: Any = None) -> Fetched:
    async def one() -> Fetched:
        async with Fetcher(config, resolver) as fetcher:
            return await fetcher.fetch(url)

    return asyncio.run(one())


def fetch(url: str, config: DownloadConfig = QUICK, resolver: Any = None) -> Fetched:
    return fetch_with_remark(url, config, resolver)._replace(remark="")


@pytest.mark.parametrize(
    ("path", "reason", "tries"),
    [
        ("/trickle", "timeout", 3),
        ("/never", "timeout", 3),
        ("/truncated", "truncated", 3),
        ("/reset", "no connection", 3),
        ("/zipped-cut", "truncated", 3),
        ("/zipped-not", "damaged encoding", 3),
        ("/nonsense", "malformed answer", 1),
        ("/encoded", r"encoding \udce9\udcff", 1),
        ("/moved-away", "HTTP 404", 1),
        ("/endless", "too large", 1),
        ("/html", "no image", 1),
        ("/empty", "no image", 1),
        ("/bomb", "too large", 1),
        ("/pixels", "too many pixels", 1),
        ("/icon", "too small", 1),
        ("/loop", "too many redirects", 1),
        ("/to-file", "redirect: other scheme", 1),
        ("/gone", "HTTP 404", 1),
        ("/always-busy", "HTTP 429", 3),
        ("/private/photo", "robots.txt", 1),
        ("/opt-out-all", "opted out", 1),
    ],
)
def test_what_is_no_image_is_named(server: Server, path: str, reason: str, tries: int) -> None:
    assert fetch(server.address + path) == Fetched(None, reason, tries)


@pytest.mark.parametrize(
    ("path", "tries"),
    [("/fine", 1), ("/zipped", 1), ("/zipped-twice", 1), ("/moved", 1), ("/busy", 3), ("/opt-out", 1)],
)
def test_images_are_fetched(server: Server, path: str, tries: int) -> None:
    content, reason, needed, _ = fetch(server.address + path)
    assert (reason, needed) == (None, tries)
    assert content is not None
    assert content.startswith(b"\xff\xd8\xff")
    assert content.endswith(b"\xff\xd9")


def test_robots_and_opt_out_can_be_disobeyed_where_one_may(server: Server) -> None:
    config = DownloadConfig(robots=False, honour_opt_out=False, allow_private_addresses=True)
    assert fetch(server.address + "/private/photo", config).reason is None
    assert fetch(server.address + "/opt-out-all", config).reason is None


def test_nobody_answers() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    config = DownloadConfig(robots=False, tries=1, allow_private_addresses=True)
    assert fetch(f"http://127.0.0.1:{port}/x", config) == Fetched(None, "no connection", 1)
    # What robots.txt says of a host that does not answer is not known: nothing is asked for (RFC 9309).
    content, reason, tries, remark = fetch_with_remark(f"http://127.0.0.1:{port}/x", QUICK)
    assert (content, reason, tries) == (None, "no connection", 1)
    assert "Connect call failed" in remark


@pytest.mark.parametrize(
    ("path", "remark"),
    [
        ("/gone", "Not Found"),
        ("/no-utf8", r"^Not\\udce9 Found\\x1b\[1m$"),
        ("/moved-away", "redirected to http://.*/gone.moved; Not Found"),
        ("/to-file", "file:///etc/passwd"),
        ("/loop", "redirected to|the last one leads to http://.*/loop"),
        ("/empty", "the answer is empty"),
        ("/html", "its format is unknown"),
        ("/icon", "16 x 16 pixels"),
        ("/endless", "more than 1,000,000 bytes"),
        ("/never", "no whole answer within 1 seconds"),
        ("/reset", "disconnected|reset"),
        ("/zipped-cut", "gzip ends too early"),
        ("/opt-out-all", "X-Robots-Tag: noimageai"),
    ],
)
def test_remarks_say_more(server: Server, path: str, remark: str) -> None:
    config = dataclasses.replace(QUICK, tries=1, timeout=2.0 if path != "/never" else 1.0)
    assert re.search(remark, fetch_with_remark(server.address + path, config).remark)


def test_hosts_that_cannot_be_reached() -> None:
    """Each has its own reason, whether it is asked for robots.txt first or not."""

    class Unknown(Liar):
        async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[dict[str, Any]]:
            if self.addresses:
                return []
            raise OSError("Name or service not known")

    async def no_tls(config: DownloadConfig) -> Fetched:
        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Speak TLS\r\n\r\n")

        listening = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with listening, Fetcher(config) as fetcher:
            return await fetcher.fetch(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/x")

    for robots in (True, False):
        config = dataclasses.replace(QUICK, robots=robots, tries=1, allow_private_addresses=False, timeout=5.0)
        for resolver in (Unknown(), Unknown("none")):
            assert fetch("http://example.org/x", config, resolver).reason == "unknown host"
        assert fetch("http://example.org/x", config, Liar("127.0.0.1")).reason == "private address"
        secure = asyncio.run(no_tls(dataclasses.replace(config, allow_private_addresses=True)))
        assert secure.reason == "no secure connection"
        assert "SSL" in secure.remark


def test_a_certificate_that_is_not_trusted() -> None:
    """It is a reason like others, and no new try helps."""

    async def one() -> tuple[str, float | None]:
        async with Fetcher(QUICK) as fetcher:
            return fetcher._reason(aiohttp.ClientConnectorCertificateError(None, ssl.CertificateError("expired")))  # type: ignore[arg-type]

    assert asyncio.run(one()) == ("no secure connection", None)


class Liar:
    """A resolver whose names lead to this machine."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[dict[str, Any]]:
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address in self.addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


def test_private_addresses_are_refused_in_every_notation(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    config = DownloadConfig(robots=False, tries=1, delay=0)
    before = server.asked.total()
    for host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254"):
        assert fetch(f"http://{host}:{port}/fine", config).reason == "private address", host
    for host in ("2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "\uff11\uff12\uff17.1"):
        assert fetch(normal_url(f"http://{host}:{port}/fine"), config).reason == "private address", host
    assert fetch(f"http://localhost:{port}/fine", config).reason == "private address"
    assert fetch(f"http://example.org:{port}/fine", config, Liar("127.0.0.1")).reason == "private address"
    assert server.asked.total() == before


def test_only_checked_addresses_are_connected_to(server: Server) -> None:
    """A name with a public and a private address: the private one is never tried, whichever comes first."""
    config = DownloadConfig(robots=False, tries=1, delay=0, connect_timeout=0.2, timeout=0.5)
    before = server.asked.total()
    port = server.address.rpartition(":")[2]
    assert fetch(f"http://example.org:{port}/fine", config, Liar("127.0.0.1", "192.0.0.9")).content is None
    assert server.asked.total() == before


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("nonsense", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_manners(server: Server) -> None:
    """No more requests to a host at once than allowed, and a pause between them; robots.txt is read once."""
    config = DownloadConfig(per_host=2, delay=0.02, allow_private_addresses=True)
    server.most_at_once, server.asked["/robots.txt"] = 0, 0

    async def many() -> float:
        async with Fetcher(config) as fetcher:
            started = asyncio.get_running_loop().time()
            results = await asyncio.gather(*(fetcher.fetch(f"{server.address}/fine?{number}") for number in range(10)))
            assert all(result.reason is None for result in results)
            return asyncio.get_running_loop().time() - started

    assert asyncio.run(many()) >= 9 * 0.02
    assert server.most_at_once <= 2
    assert server.asked["/robots.txt"] == 1


def test_a_slow_host_holds_nobody_up(server: Server) -> None:
    """Requests that wait for their turn at one host leave room for those to others."""
    slow, other = server.address, server.address.replace("127.0.0.1", "localhost")
    config = DownloadConfig(concurrency=2, per_host=1, delay=0.2, robots=False, allow_private_addresses=True)

    async def many() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        async with Fetcher(config) as fetcher:
            waiting = [asyncio.ensure_future(fetcher.fetch(f"{slow}/fine?{number}")) for number in range(6)]
            await asyncio.sleep(0)
            started = loop.time()
            assert (await fetcher.fetch(f"{other}/fine")).reason is None
            first = loop.time() - started
            await asyncio.gather(*waiting)
            return first, loop.time() - started

    first, last = asyncio.run(many())
    assert first < last / 2


def test_when_to_come_again() -> None:
    later = datetime.now(timezone.utc) + timedelta(seconds=100)
    assert _retry_after({"Retry-After": "7"}) == 7
    assert 90 < _retry_after({"Retry-After": format_datetime(later, usegmt=True)}) <= 100
    for value in ("", "soon", "-5", "Wed, 21 Oct 2015 07:28:00 GMT", "\u00b2"):
        assert _retry_after({"Retry-After": value}) == 0


def test_of_a_long_robots_txt_the_beginning_counts(server: Server) -> None:
    async def read() -> bytes:
        async with Fetcher(QUICK) as fetcher:
            answer = await fetcher._robots_file(f"{server.address}/long-robots")
            return answer.content

    content = asyncio.run(read())
    assert content.startswith(b"User-agent: *\nDisallow: /private/\n")
    assert len(content) == 512_000
