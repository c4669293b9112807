"""What robots.txt says (RFC 9309): in any encoding, with any line ends, and what answers without rules mean."""

from __future__ import annotations

import asyncio

import pytest

from dinov2.curate.download import DownloadConfig
from dinov2.curate.fetching import Fetched, Fetcher, _FailedError, _Redirect
from dinov2.curate.web import Robots, RobotsFile

HOST = "http://site.org"


def robots(content: bytes, status: int = 200, agent: str = "dinov2-curate") -> Robots:
    async def fetch(url: str) -> RobotsFile:
        assert url == f"{HOST}/robots.txt"
        return RobotsFile(status, content)

    return Robots(fetch, agent)


def allows(content: bytes, path: str, status: int = 200) -> bool:
    async def ask() -> bool:
        return await robots(content, status).allows(HOST + path)

    return asyncio.run(ask())


RULES = "User-agent: *\nDisallow: /private/\n"


@pytest.mark.parametrize(
    "content",
    [
        RULES.encode(),
        RULES.encode("utf-8-sig"),
        RULES.encode("utf-16"),
        b"\xfe\xff" + RULES.encode("utf-16-be"),
        RULES.replace("\n", "\r\n").encode("utf-8-sig"),
        RULES.replace("\n", "\r").encode(),
        b"# \xe9\xff\x00 no UTF-8\n" + RULES.encode(),
        b"  user-AGENT :  *   # all\n\tDISALLOW:/private/ # nothing to see\n",
        b"User-agent: *\n\n\nDisallow: /private/",
    ],
    ids=["plain", "UTF-8 mark", "UTF-16", "UTF-16 BE", "CRLF", "CR", "other bytes", "spaces", "empty lines"],
)
def test_every_way_to_write_the_same_rules(content: bytes) -> None:
    assert not allows(content, "/private/x.jpg")
    assert allows(content, "/public/x.jpg")


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        # groups
        ("User-agent: other\nDisallow: /", "/x", True),
        ("User-agent: other\nUser-agent: dinov2-curate\nDisallow: /", "/x", False),
        ("User-agent: DINOv2-Curate\nDisallow: /", "/x", False),
        ("User-agent: dinov2-curate/1.0 (bot)\nDisallow: /", "/x", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: dinov2-curate\nDisallow:", "/x", True),
        ("User-agent: *\nDisallow: /a\nUser-agent: other\nDisallow: /\nUser-agent: *\nDisallow: /b", "/b", False),
        ("User-agent: *\nSitemap: http://site.org/s.xml\nDisallow: /a", "/a", False),
        ("Disallow: /", "/x", True),
        ("<html><body>no such page</body></html>", "/x", True),
        # the longest rule counts; among equals, Allow
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),
        ("User-agent: *\nAllow: /a/b\nDisallow: /a", "/a/c", False),
        ("User-agent: *\nDisallow: /a\nAllow: /a", "/a", True),
        ("User-agent: *\nAllow: /\nDisallow: /*.jpg", "/x.jpg", False),
        # wildcards
        ("User-agent: *\nDisallow: /*.gif$", "/x.gif", False),
        ("User-agent: *\nDisallow: /*.gif$", "/x.gif?y", True),
        ("User-agent: *\nDisallow: /a*/c", "/abb/c/d", False),
        ("User-agent: *\nDisallow: *", "/x", False),
        ("User-agent: *\nDisallow: /x$", "/xy", True),
        # queries, and letters that URLs escape
        ("User-agent: *\nDisallow: /*?id=", "/x?id=3", False),
        ("User-agent: *\nDisallow: /caf\u00e9", "/caf%C3%A9/x", False),
        ("User-agent: *\nDisallow: /caf%c3%a9", "/caf%C3%A9/x", False),
        ("User-agent: *\nDisallow: /a b", "/a%20b", False),
        ("User-agent: *\nDisallow: /%7Ejoe", "/~joe/x", False),
    ],
)
def test_rules(rules: str, path: str, allowed: bool) -> None:
    assert allows(rules.encode(), path) == allowed


def test_paths_in_another_encoding() -> None:
    rules = "User-agent: *\nDisallow: /caf\u00e9".encode("latin-1")
    assert not allows(rules, "/caf%E9/x")
    assert allows(rules, "/caf%C3%A9/x")


@pytest.mark.parametrize(
    ("status", "allowed"),
    [(0, False), (200, False), *((status, True) for status in (204, 401, 403, 404, 410)), (429, False), (503, False)],
)
def test_answers(status: int, allowed: bool) -> None:
    """Whoever has no rules allows all; whoever does not answer for them allows nothing (RFC 9309, 2.3.1)."""
    assert allows(RULES.encode() if status == 200 else b"", "/private/", status) == allowed


@pytest.mark.parametrize(
    ("failure", "location", "reason"),
    [
        ("no connection", "", "no connection"),
        ("unknown host", "", "unknown host"),
        ("timeout", "", "timeout"),
        ("HTTP 503", "", "robots.txt: HTTP 503"),
        ("HTTP 429", "", "robots.txt: HTTP 429"),
        ("truncated", "", "robots.txt: truncated"),
        ("timeout", "/other", "timeout"),
        ("timeout", "http://other.org/robots.txt", "robots.txt: timeout"),
    ],
)
def test_why_rules_are_not_known(failure: str, location: str, reason: str) -> None:
    """Only a file that disallows is "robots.txt"; a host that does not answer has the reason of its own failure."""

    async def ask() -> object:
        async with Fetcher(DownloadConfig(tries=1, allow_private_addresses=True)) as fetcher:

            async def get(url: str, limit: int, is_robots: bool = False) -> object:
                assert is_robots
                if location and url == f"{HOST}/robots.txt":
                    return _Redirect(location)
                raise _FailedError(failure, "its words")

            fetcher._get = get  # type: ignore[assignment, method-assign]
            return await fetcher.fetch(f"{HOST}/x.jpg")

    assert asyncio.run(ask()) == Fetched(None, reason, 1, "its words")


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [("Crawl-delay: 2.5", 2.5), ("Crawl-delay: soon", 0), ("Crawl-delay: -1", 0), ("Disallow: /a", 0)],
)
def test_crawl_delay(lines: str, seconds: float) -> None:
    async def ask() -> float:
        return await robots(f"User-agent: *\n{lines}\n".encode("utf-8-sig")).delay(f"{HOST}/x")

    assert asyncio.run(ask()) == seconds


def test_a_crawl_delay_slows_the_requests_to_a_host() -> None:
    config = DownloadConfig(delay=0, tries=1, timeout=1, max_wait=0.1, allow_private_addresses=True)

    async def fetch_three() -> list[float]:
        async with Fetcher(config) as fetcher:
            loop, turns = asyncio.get_running_loop(), list[float]()

            async def get(url: str, limit: int, is_robots: bool = False) -> bytes:
                if is_robots:
                    return b"User-agent: *\nCrawl-delay: 100\n"
                await fetcher._wait_for_turn("site.org")
                turns.append(loop.time())
                return b"no image"

            fetcher._get = get  # type: ignore[method-assign]
            await asyncio.gather(*(fetcher.fetch(f"{HOST}/{number}") for number in range(3)))
            return turns

    first, second, third = asyncio.run(fetch_three())
    assert min(second - first, third - second) > 0.09  # max_wait: a host cannot stop the whole task
