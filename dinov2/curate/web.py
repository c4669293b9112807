"""What a crawler needs to know of the web: URLs and lists of domains, public addresses, opt-outs, robots.txt."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

MAX_URL = 2048  # characters, as common browsers and servers have it
MAX_HOST = 253
DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE = "!$%&'()*+,-./:;=?@[]_~|"  # stay as they are beside letters and digits, in paths and queries
NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.ASCII)
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that has been given out of IPv6; more than is_global asks
NO_ROBOTS = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
"""Directives that have a value after a colon, as robots' names have their directives."""

ROBOT = re.compile(r"[a-z_*][\w*.-]*", re.ASCII)
ROBOTS_BYTES = 512_000


class RefusedURLError(ValueError):
    """A URL is nothing to fetch; ``reason`` is one of a few words that are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def normal_url(link: str, page: str = "") -> str:
    """A link as an absolute http or https URL in ASCII, without fragment and credentials, its host as
    :func:`canonical_host` has it; what is sent to a server is this, letter by letter.

    Args:
        link: as it stands in a page.
        page: URL that it is relative to.

    Raises:
        RefusedURLError: it is no such URL.
    """
    link = link.strip()
    if link[:5].lower() == "data:":
        raise RefusedURLError("data: URL")
    if len(link) > MAX_URL:
        raise RefusedURLError("too long URL")
    place, mark, rest = re.sub("[\t\r\n]", "", link).partition("?")
    link = place.replace("\\", "/") + mark + rest  # as browsers do
    try:
        parts = urlsplit(urljoin(page, link))
        port = parts.port
        if parts.scheme not in DEFAULT_PORTS:
            raise RefusedURLError("other scheme" if parts.scheme else "relative URL of an unknown page")
        host = canonical_host(parts.hostname or "")
        path, query = (quote(text, safe=SAFE) for text in (parts.path or "/", parts.query))
    except RefusedURLError:
        raise
    except ValueError:  # UnicodeError among them
        raise RefusedURLError("malformed URL") from None
    place = f"[{host}]" if ":" in host else host
    if port is not None and port != DEFAULT_PORTS[parts.scheme]:
        place += f":{port}"
    url = urlunsplit(SplitResult(parts.scheme, place, path, query, ""))
    if any(ord(letter) < 32 for letter in parts.path + parts.query):
        raise RefusedURLError("malformed URL")
    if len(url) > MAX_URL:
        raise RefusedURLError("too long URL")
    return url


def canonical_host(host: str) -> str:
    """A host as there is one way to write it: a name in lower case and ASCII (IDNA) without a final dot, or an address.

    What ends in a number is an IPv4 address, which may be written with fewer than four numbers, octal or hexadecimal
    (URL Standard, "host parsing"): ``0x7f.1`` is ``127.0.0.1``. So nobody who looks at a host takes it for a name that
    the system's resolver takes for an address.

    Raises:
        ValueError: it is neither.
    """
    if ":" in host:
        return str(ipaddress.IPv6Address(host if "%" not in host else ""))  # a zone is of one machine
    if len(host) > MAX_HOST:
        raise ValueError("a host has at most 253 characters")
    name = host.rstrip(".")
    name = (name if name.isascii() else name.encode("idna").decode()).lower()
    if not NAME.fullmatch(name):
        raise ValueError("a name is of letters, digits, - and _, and of dots between these")
    if not NUMBER.fullmatch(name.rpartition(".")[2]):
        return name
    try:
        return socket.inet_ntoa(socket.inet_aton(name))
    except OSError:
        raise ValueError("it ends in a number, and is no address") from None


def host_of(url: str) -> str:
    """The host of a normal URL, with its port where it is not the scheme's own."""
    return urlsplit(url).netloc


@lru_cache(maxsize=8)
def read_domains(path: str) -> frozenset[str]:
    """The domains in a file, one a line, in any script; ``#`` begins a remark. None for an empty path.

    Raises:
        ValueError: a line is no domain.
    """
    if not path:
        return frozenset()
    storage = Storage(path)
    lines = storage.filesystem.cat_file(storage.root).decode("utf-8", "replace").splitlines()
    names = set[str]()
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip().strip("."):
            try:
                names.add(canonical_host(text))
            except ValueError:
                raise ValueError(f"domains must be one a line, but line {number} of {path} is {text!r}") from None
    return frozenset(names)


def is_blocked(url: str, domains: frozenset[str]) -> bool:
    """Whether a normal URL's host is one of the domains or below one."""
    labels = (urlsplit(url).hostname or "").split(".")
    return any(".".join(labels[start:]) in domains for start in range(len(labels)))


class PrivateAddressError(OSError):
    """A name leads to no public address."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: not private, loopback, link-local, multicast or reserved, nor one
    of these within an IPv6 address (mapped, 6to4, Teredo, NAT64)."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:  # which Python counts among the reserved
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if any(v4 is not None and not is_public(str(v4)) for v4 in inner):
            return False
        if ip not in UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_literal(url: str) -> None:
    """Refuse a normal URL whose host is an address that is not public; names are for :func:`public_resolver`.

    Raises:
        PrivateAddressError: it is one.
    """
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return  # a name
    if not is_public(host):
        raise PrivateAddressError(host)


def public_resolver(inner: Any = None) -> Any:
    """A resolver of aiohttp that gives public addresses only.

    The addresses that it has checked are those that aiohttp connects to, so a name that answers differently the second
    time gains nothing.

    Args:
        inner: resolver that is asked; the system's by default.
    """
    aiohttp = require("aiohttp", extra="curate", purpose="downloading")
    abc = require("aiohttp.abc", extra="curate", purpose="downloading")
    asked = inner or aiohttp.ThreadedResolver()

    class PublicResolver(abc.AbstractResolver):  # type: ignore[misc, name-defined]
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[dict[str, Any]]:
            found = await asked.resolve(host, port, family)
            public = [entry for entry in found if is_public(entry["host"])]
            if not public:
                raise PrivateAddressError(host)
            return public

        async def close(self) -> None:
            await asked.close()

    return PublicResolver()


def opts_out(headers: Iterable[str], words: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag headers, or the contents of robots meta tags, hold one of the words for us.

    A value may begin with the name of the robot that it is for, as may each directive in it: ``googlebot: noindex,
    noai`` does not concern others.

    Args:
        headers: values, each with directives parted by commas.
        words: directives that count.
        agent: our name as a robot.
    """
    unwanted = {word.lower() for word in words}
    for value in headers:
        concerns_us = True
        for part in value.lower().split(","):
            name, colon, directive = (text.strip() for text in part.partition(":"))
            if not colon:
                directive = name
            elif name in NO_ROBOTS or not (name == "" or ROBOT.fullmatch(name)):  # such as a date with its time
                continue
            else:
                concerns_us = name in ("", "*", agent.lower())
            if concerns_us and directive in unwanted:
                return True
    return False


class RobotsFile(NamedTuple):
    """What a server answered."""

    status: int  # 0 for no answer
    content: bytes


class Robots:
    """Says what a host allows.

    Args:
        fetch: gets the file at a URL.
        agent: our name.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[RobotsFile]], agent: str) -> None:
        self._fetch = fetch
        self._agent = agent
        self._rules: dict[str, asyncio.Task[Any]] = {}

    async def allows(self, url: str) -> bool:
        """Whether the host lets us have a URL."""
        parts = urlsplit(url)
        root = f"{parts.scheme}://{parts.netloc}"
        if root not in self._rules:
            self._rules[root] = asyncio.ensure_future(self._read(f"{root}/robots.txt"))
        rules = await asyncio.shield(self._rules[root])
        return rules if isinstance(rules, bool) else bool(rules.can_fetch(url, self._agent))

    async def _read(self, url: str) -> Any:
        """Rules; or True where there are none, False where the server cannot say."""
        protego = require("protego", extra="curate", purpose="reading robots.txt")
        answer = await self._fetch(url)
        if 400 <= answer.status < 500 and answer.status != 429:
            return True
        if answer.status != 200:
            return False
        return protego.Protego.parse(answer.content.decode("utf-8", "replace"))
