"""URLs and their hosts: what may be fetched at all, and lists of domains."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

from dinov2.data.shards.storage import Storage

MAX_URL = 2048  # characters, as common browsers and servers have it


class RefusedURLError(ValueError):
    """A URL is nothing to fetch; ``reason`` is one of a few words that are counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def normal_url(link: str, page: str = "") -> str:
    """A link as an absolute http or https URL, without fragment and credentials, its host in lower case and ASCII.

    Args:
        link: as it stands in a page.
        page: URL that it is relative to.

    Raises:
        RefusedURLError: it is no such URL.
    """
    link = link.strip()
    if link[:5].lower() == "data:":
        raise RefusedURLError("data: URL")
    link = re.sub("[\t\r\n]", "", link).replace(" ", "%20")  # as browsers do
    try:
        parts = urlsplit(urljoin(page, link))
        host = (parts.hostname or "").rstrip(".")
        port = parts.port
    except ValueError:
        raise RefusedURLError("malformed URL") from None
    if parts.scheme not in ("http", "https"):
        raise RefusedURLError("other scheme" if parts.scheme else "relative URL of an unknown page")
    if not host:
        raise RefusedURLError("malformed URL")
    if not host.isascii():
        try:
            host = host.encode("idna").decode()
        except UnicodeError:
            raise RefusedURLError("malformed URL") from None
    place = f"[{host}]" if ":" in host else host
    if port is not None and port != {"http": 80, "https": 443}[parts.scheme]:
        place += f":{port}"
    url = urlunsplit(SplitResult(parts.scheme, place, parts.path or "/", parts.query, ""))
    if len(url) > MAX_URL or any(ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in url):
        raise RefusedURLError("too long URL" if len(url) > MAX_URL else "malformed URL")
    return url


def host_of(url: str) -> str:
    """The host of a normal URL, with its port where it is not the scheme's own."""
    return urlsplit(url).netloc


@lru_cache(maxsize=8)
def read_domains(path: str) -> frozenset[str]:
    """The domains in a file, one a line; ``#`` begins a remark. None for an empty path."""
    if not path:
        return frozenset()
    storage = Storage(path)
    lines = storage.filesystem.cat_file(storage.root).decode("utf-8", "replace").splitlines()
    names = (line.partition("#")[0].strip().lower().strip(".") for line in lines)
    return frozenset(name for name in names if name)


def is_blocked(url: str, domains: frozenset[str]) -> bool:
    """Whether a URL's host is one of the domains or below one."""
    labels = (urlsplit(url).hostname or "").split(".")
    return any(".".join(labels[start:]) in domains for start in range(len(labels)))
