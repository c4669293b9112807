"""Links to images in one HTML page."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urljoin

from dinov2_kernels._extras import require

SOURCES = ("src", "data-src", "data-original", "data-lazy-src", "data-lazy", "data-url", "data-image")
SETS = ("srcset", "data-srcset", "data-lazy-srcset")
MAX_ALT = 500  # characters


class Link(NamedTuple):
    """A link as it stands in a page."""

    url: str
    alt: str
    attribute: str


class Page(NamedTuple):
    """What a page holds.

    Attributes:
        base: URL that its links are relative to; "" where the page does not say and nobody else did.
        robots: contents of its robots meta tags.
        links: to images, each once, in the order of the page.
    """

    base: str
    robots: list[str]
    links: list[Link]


def parse_page(content: bytes, url: str, charset: str | None = None) -> Page:
    """Read a page, however malformed.

    Of each ``img`` the largest candidate of its srcset counts, else its src or one of the attributes in which scripts
    that load late keep it; of each ``picture`` the first source.

    Args:
        content: of the page.
        url: its address, "" if it is not known; then the page's canonical link or ``og:url`` is taken.
        charset: as its headers say.
    """
    parser = require("resiliparse.parse.html", extra="curate", purpose="reading web pages")
    document = parser.HTMLTree.parse(_decoded(content, charset)).document
    if document is None:
        return Page(url, [], [])
    base, robots, links = url, list[str](), dict[str, Link]()

    def elements(selector: str) -> Any:
        return document.query_selector_all(selector)[:]  # iterating over what it returns would query for each element

    for element in elements("meta, link, base"):
        values = _attributes(element)
        if element.tag == "meta" and values.get("name", "").lower() in ("robots", "googlebot-image"):
            robots.append(values.get("content", ""))
        elif not url and element.tag == "link" and values.get("rel", "").lower() == "canonical":
            base = base or values.get("href", "")
        elif not url and element.tag == "meta" and values.get("property", "").lower() == "og:url":
            base = base or values.get("content", "")
    bases = [_attributes(element).get("href") for element in elements("base")]
    with contextlib.suppress(ValueError):
        base = next((urljoin(base, found) for found in bases if found), base)
    for element in elements("img, picture source"):
        for link in _links_of(element):
            links.setdefault(link.url, link)
    return Page(base, robots, list(links.values()))


def _decoded(content: bytes, charset: str | None) -> str:
    """The text of a page: as its headers say, else UTF-8 if it is that, else by a guess."""
    encoding = require("resiliparse.parse.encoding", extra="curate", purpose="reading web pages")
    name = encoding.map_encoding_to_html5(charset) if charset else None
    if name is None:
        try:
            return content.decode()
        except UnicodeDecodeError:
            name = encoding.detect_encoding(content)
    text: str = encoding.bytes_to_str(content, name or "utf-8", errors="replace")
    return text


def _links_of(element: Any) -> Iterator[Link]:
    values = _attributes(element)
    alt = " ".join(values.get("alt", "").split())[:MAX_ALT]
    for attribute in SETS:
        if largest := largest_candidate(values.get(attribute, "")):
            yield Link(largest, alt, attribute)
            return
    if element.tag == "source":
        return
    late = [name for name in SOURCES[1:] if values.get(name, "").strip()]
    attribute = late[0] if late else "src"  # beside a late one, src is a placeholder
    if url := values.get(attribute, "").strip():
        yield Link(url, alt, attribute)


def _attributes(element: Any) -> dict[str, str]:
    return {name.lower(): element.getattr(name) or "" for name in element.attrs or []}


def largest_candidate(srcset: str) -> str | None:
    """The URL in a ``srcset`` with the largest width or density, of equal ones the first; None where there is none.

    A comma within a URL belongs to it, unless it is the last character; so data: URLs survive.
    """
    best: tuple[float, str] | None = None
    words = srcset.split()
    number = 0
    while number < len(words):
        url = words[number].lstrip(",")
        number += 1
        size = 1.0
        if url.endswith(","):
            url = url.rstrip(",")
        elif number < len(words) and (descriptor := words[number].partition(",")[0]):
            try:
                size = float(descriptor[:-1])
            except ValueError:
                size = 0.0
            rest = words[number].partition(",")[2]
            number += 1
            if rest:  # 1x,next.png without a space
                words.insert(number, rest)
        if url and (best is None or size > best[0]):
            best = size, url
    return best[1] if best else None
