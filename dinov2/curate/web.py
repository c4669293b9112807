"""Rules of the web for a crawler: URLs, lists of domains, public addresses, opt-outs, robots.txt."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

from dinov2.curate.charsets import MARKS
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

MAX_URL = 2048  # characters, a limit of common browsers and servers
MAX_HOST = 253
DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE = "!$%&'()*+,-./:;=?@[]_~|"  # like letters and digits, these are not escaped in paths and queries
NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.ASCII)
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # the IPv6 addresses that are in use; is_global allows more
NO_ROBOTS = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
"""Directives with a value after a colon. So the text before a colon is not always a robot's name."""

ROBOT = re.compile(r"[a-z_*][\w*.-]*", re.ASCII)
ROBOTS_BYTES = 512_000
VERSION = re.compile(r"((?:^|(?<=[\r\n]))[ \t]*user-?agent[ \t]*:[ \t]*[^\s/#]+)/[^\r\n#]*", re.IGNORECASE)


class RefusedURLError(ValueError):
    """A URL cannot be fetched. ``reason`` is one of a few texts that are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def normal_url(link: str, page: str = "") -> str:
    """Turn a link into an absolute http or https URL in ASCII, without fragment and credentials.

    The host is in the form of :func:`canonical_host`. Exactly this URL is sent to a server.

    Args:
        link: text of the link in a page.
        page: URL that the link is relative to.

    Raises:
        RefusedURLError: the link is no such URL.
    """
    link = link.strip()
    if link[:5].lower() == "data:":
        raise RefusedURLError("data: URL")
    if len(link) > MAX_URL:
        raise RefusedURLError("too long URL")
    place, mark, rest = re.sub("[\t\r\n]", "", link).partition("?")
    link = place.replace("\\", "/") + mark + rest  # browsers do the same
    try:
        parts = urlsplit(urljoin(page, link))
        port = parts.port
        if parts.scheme not in DEFAULT_PORTS:
            raise RefusedURLError("other scheme" if parts.scheme else "relative URL of an unknown page")
        host = canonical_host(parts.hostname or "")
        path, query = (quote(text, safe=SAFE) for text in (parts.path or "/", parts.query))
    except RefusedURLError:
        raise
    except ValueError:  # UnicodeError included
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
    """The one way to write a host: a name in lower case and ASCII (IDNA) without a final dot, or an address.

    A host that ends in a number is an IPv4 address. It may have fewer than four numbers, octal or hexadecimal (URL
    Standard, "host parsing"): ``0x7f.1`` is ``127.0.0.1``. So a host that looks like a name is never an address for the
    system's resolver.

    Raises:
        ValueError: the host is neither a name nor an address.
    """
    if ":" in host:
        return str(ipaddress.IPv6Address(host if "%" not in host else ""))  # a zone has a meaning on one machine only
    if len(host) > MAX_HOST:
        raise ValueError(f"host: expected at most {MAX_HOST} characters, got {len(host)}")
    name = (host if host.isascii() else _ascii_name(host)).rstrip(".").lower()
    if not NAME.fullmatch(name):
        raise ValueError(f"host: expected letters, digits, - and _ with dots between them, got {name!r}")
    if not NUMBER.fullmatch(name.rpartition(".")[2]):
        return name
    try:
        return socket.inet_ntoa(socket.inet_aton(name))
    except OSError:
        raise ValueError(f"host: expected an address, because it ends in a number, got {name!r}") from None


def _ascii_name(host: str) -> str:
    """A name in another script as browsers send it (UTS 46, nontransitional): ``straße.de`` is not ``strasse.de``."""
    idna = require("idna", extra="curate", purpose="hosts whose names are not ASCII")
    labels = idna.uts46_remap(host, std3_rules=False).split(".")
    return ".".join(label if label.isascii() else f"xn--{label.encode('punycode').decode()}" for label in labels)


def host_of(url: str) -> str:
    """The host of a normal URL, with the port unless it is the default port of the scheme."""
    return urlsplit(url).netloc


@lru_cache(maxsize=8)
def read_domains(path: str) -> frozenset[str]:
    """Read the domains in a file, one a line, in any script. ``#`` begins a remark. An empty path has no domains.

    The file is UTF-8, with or without a byte order mark.

    Raises:
        ValueError: a line is not a domain.
    """
    if not path:
        return frozenset()
    storage = Storage(path)
    lines = storage.filesystem.cat_file(storage.root).decode("utf-8-sig", "replace").splitlines()
    names = set[str]()
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip().strip("."):
            try:
                names.add(canonical_host(text))
            except ValueError:
                raise ValueError(f"{path}: expected one domain a line, got {text!r} in line {number}") from None
    return frozenset(names)


def is_blocked(url: str, domains: frozenset[str]) -> bool:
    """Whether a normal URL's host is one of the domains or a subdomain."""
    labels = (urlsplit(url).hostname or "").split(".")
    return any(".".join(labels[start:]) in domains for start in range(len(labels)))


class PrivateAddressError(OSError):
    """A host has no address but ones that are not public."""


def is_public(address: str) -> bool:
    """Whether an IP address is public: not private, loopback, link-local, multicast or reserved. IPv4 addresses within
    IPv6 addresses (mapped, 6to4, Teredo, NAT64) are checked too."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:  # Python counts these as reserved
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if any(v4 is not None and not is_public(str(v4)) for v4 in inner):
            return False
        if ip not in UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_literal(url: str) -> None:
    """Refuse a normal URL whose host is a private address. :func:`public_resolver` checks names.

    Raises:
        PrivateAddressError: the host is a private address.
    """
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return  # a name
    if not is_public(host):
        raise PrivateAddressError(host)


def public_resolver(inner: Any = None) -> Any:
    """A resolver of aiohttp that returns public addresses only.

    aiohttp connects to exactly the addresses that were checked. So a name that answers differently the second time does
    not lead into a private network.

    Args:
        inner: the resolver whose answers are checked; the system's by default.
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
            if found and not public:
                raise PrivateAddressError(f"{host} is {', '.join(entry['host'] for entry in found)}")
            if not public:
                raise OSError(f"{host} has no address")
            return public

        async def close(self) -> None:
            await asked.close()

    return PublicResolver()


def opts_out(headers: Iterable[str], words: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag headers, or the contents of robots meta tags, have one of the words for us.

    A value, and each directive in it, may begin with the name of a robot. Then it is for this robot only, as in
    ``googlebot: noindex, noai``. Directives that only spaces or semicolons separate count, too.

    Args:
        headers: values, each a list of directives separated by commas.
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
            if concerns_us and not unwanted.isdisjoint(re.split(r"[\s;]+", directive)):
                return True
    return False


class RobotsFile(NamedTuple):
    """The answer of a server.

    Attributes:
        status: status of HTTP, 0 for no answer.
        content: the file.
        failure: why there is no file, as one of the reasons that are counted.
        remark: more words about the failure.
    """

    status: int
    content: bytes
    failure: str = ""
    remark: str = ""


class Robots:
    """Reads robots.txt and says what a host allows.

    Args:
        fetch: function that gets the file at a URL.
        agent: our name as a robot.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[RobotsFile]], agent: str) -> None:
        self._fetch = fetch
        self._agent = agent
        self._rules: dict[str, asyncio.Task[Any]] = {}

    async def allows(self, url: str) -> bool:
        """Whether the host allows us to fetch a URL."""
        return await self.refusal(url) is None

    async def refusal(self, url: str) -> tuple[str, str] | None:
        """Why we may not fetch a URL, as a reason and a remark; None if we may.

        The reason is ``robots.txt`` only if the file says so. A host that does not answer for its robots.txt has the
        reason of its failure.
        """
        rules = await self._rules_for(url)
        if isinstance(rules, RobotsFile):
            return rules.failure or f"robots.txt: HTTP {rules.status}", rules.remark
        return None if rules is None or rules.can_fetch(url, self._agent) else ("robots.txt", "")

    async def delay(self, url: str) -> float:
        """The seconds that the host of a URL asks us to wait between two requests (Crawl-delay)."""
        rules = await self._rules_for(url)
        return 0.0 if rules is None or isinstance(rules, RobotsFile) else float(rules.crawl_delay(self._agent) or 0)

    async def _rules_for(self, url: str) -> Any:
        parts = urlsplit(url)
        root = f"{parts.scheme}://{parts.netloc}"
        if root not in self._rules:
            self._rules[root] = asyncio.ensure_future(self._read(f"{root}/robots.txt"))
        return await asyncio.shield(self._rules[root])

    async def _read(self, url: str) -> Any:
        """The rules of a host; None if it has none, its answer if the server does not answer for them."""
        protego = require("protego", extra="curate", purpose="reading robots.txt")
        answer = await self._fetch(url)
        if 200 < answer.status < 300 or (400 <= answer.status < 500 and answer.status != 429):
            return None  # there are no rules, such as with 204 and 404
        if answer.status != 200:
            return answer
        return protego.Protego.parse(robots_text(answer.content))


def robots_text(content: bytes) -> str:
    """A robots.txt as Protego reads it best: in ASCII, without a byte order mark and without versions of robots.

    Bytes that are not ASCII stand as URLs have them, in any encoding (RFC 9309, 2.2.2): ``/café`` is ``/caf%C3%A9`` in
    UTF-8, and ``/caf%E9`` in Latin-1. ``User-agent: us/1.0`` addresses us as ``User-agent: us`` does.
    """
    for mark, name in MARKS:
        if content.startswith(mark):
            content = content[len(mark) :].decode(name, "replace").encode()
            break
    text = re.sub(rb"[\x80-\xff]", lambda byte: b"%%%02X" % ord(byte[0]), content).decode("ascii")
    return VERSION.sub(r"\1", text)
