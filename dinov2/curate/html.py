"""Links to images in one HTML page."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urljoin

from dinov2_kernels._extras import require

SOURCES = ("src", "data-src", "data-original", "data-lazy-src", "data-lazy", "data-url", "data-image")
SETS = ("srcset", "data-srcset", "data-lazy-srcset")
MAX_ALT = 500  # characters

_CANDIDATE = re.compile(r"[\s,]*(\S+)")
_SIZE = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)[wx]")


class Link(NamedTuple):
    """A link as the page has it."""

    url: str
    alt: str
    attribute: str


class Page(NamedTuple):
    """The contents of a page.

    Attributes:
        base: URL that the page's links are relative to; "" if it is unknown.
        robots: contents of the page's robots meta tags.
        links: links to images, without repeats, in the order of the page.
    """

    base: str
    robots: list[str]
    links: list[Link]


def parse_page(content: bytes, url: str, charset: str | None = None, agent: str = "") -> Page:
    """Read a page, however malformed, in time that grows with its length.

    An ``img`` gives the largest candidate of its srcset, else its src or an attribute in which scripts that load late
    keep the link. Each ``source`` of a ``picture`` gives its largest candidate.

    Args:
        content: bytes of the page.
        url: address of the page; if it is "", the page's canonical link or ``og:url`` is taken.
        charset: character set by the page's headers.
        agent: our name as a robot; a page may have a meta tag for it.
    """
    parser = require("resiliparse.parse.html", extra="curate", purpose="reading web pages")
    document = parser.HTMLTree.parse(_decoded(content, charset)).document
    if document is None:
        return Page(url, [], [])
    base, robots, links = url, list[str](), dict[str, Link]()

    def elements(selector: str) -> Any:
        return document.query_selector_all(selector)[:]  # iterating over the result would query for each element

    for element in elements("meta"):
        name, says = (_value(element, attribute).lower() for attribute in ("name", "property"))
        if name and name in ("robots", "googlebot-image", agent.lower()):
            robots.append(_value(element, "content"))
        elif says == "og:url" and not base:
            base = _value(element, "content")
    canonical = (_value(link, "href") for link in elements("link") if _value(link, "rel").lower() == "canonical")
    base = url or next(canonical, "") or base
    bases = [_value(element, "href") for element in elements("base")]
    with contextlib.suppress(ValueError):
        base = next((urljoin(base, found) for found in bases if found), base)
    for element in elements("img, source"):
        if element.tag == "source" and (element.parent is None or element.parent.tag != "picture"):
            continue  # a source of a video; a selector for it would look at all ancestors
        for link in _links_of(element):
            links.setdefault(link.url, link)
    return Page(base, robots, list(links.values()))


def _decoded(content: bytes, charset: str | None) -> str:
    """Decode a page: by its headers, else as UTF-8 if it is valid, else by a guess."""
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
    alt = " ".join(_value(element, "alt").split())[:MAX_ALT]
    for attribute in SETS:
        if largest := largest_candidate(_value(element, attribute)):
            yield Link(largest, alt, attribute)
            return
    if element.tag == "source":
        return
    for attribute in (*SOURCES[1:], "src"):  # src is a placeholder if there is an attribute of late loading
        if url := _value(element, attribute).strip():
            yield Link(url, alt, attribute)
            return


def _value(element: Any, attribute: str) -> str:
    """An attribute's value. It is looked up by name, because an element may have a million attributes."""
    return element.getattr(attribute) or ""


def largest_candidate(srcset: str) -> str | None:
    """The URL in a ``srcset`` with the largest width or density; among equals, the first. None if there is no URL.

    A comma within a URL belongs to it, unless it is the last character. So data: URLs stay whole.
    """
    best: tuple[float, str] | None = None
    position = 0
    while candidate := _CANDIDATE.match(srcset, position):
        url, position, size = candidate[1], candidate.end(), 1.0
        if url.endswith(","):
            url = url.rstrip(",")
        else:
            end = srcset.find(",", position)
            end = len(srcset) if end < 0 else end
            if descriptor := srcset[position:end].strip():
                known = _SIZE.match(descriptor)
                size = float(known[1]) if known else 0.0
            position = end
        if url and (best is None or size > best[0]):
            best = size, url
    return best[1] if best else None
