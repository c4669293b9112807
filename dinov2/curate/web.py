"""URLs and their hosts: what may be fetched at all, and lists of domains."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache
from urllib.parse import SplitResult, quote, urljoin, urlsplit, urlunsplit

from dinov2.data.shards.storage import Storage

MAX_URL = 2048  # characters, as common browsers and servers have it
MAX_HOST = 253
DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE = "!$%&'()*+,-./:;=?@[]_~|"  # stay as they are beside letters and digits, in paths and queries
NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.ASCII)
NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


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
