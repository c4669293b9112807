"""Links to images in one HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from dinov2.curate.charsets import WIDER, decode
from dinov2.extras import require

LATE_SETS = ("data-srcset", "data-lazy-srcset", "data-src-set", "data-original-set", "lazy-srcset")
LATE_SOURCES = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-lazyload",
    "data-lazy-load",
    "data-original-src",
    "data-actualsrc",
    "data-cfsrc",
    "data-echo",
    "data-url",
    "data-image",
    "lazy-src",
)
"""In these attributes, scripts that load images late keep the link. Until then, ``srcset`` or ``src`` has a placeholder
or a small preview."""

MAX_ALT = 500  # characters

_SPACE = " \t\n\f\r"
_CANDIDATE = re.compile(rf"[{_SPACE},]*([^{_SPACE}]+)")
_DESCRIPTORS = re.compile(r"(?:[^,(]|\([^)]*\)?)*")
_WIDTH = re.compile(r"0*([1-9]\d{0,8})w", re.ASCII)
_HEIGHT = re.compile(r"0*[1-9]\d{0,8}h", re.ASCII)
_DENSITY = re.compile(r"((?:\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})(?:e[+-]?\d)?)x", re.ASCII | re.IGNORECASE)
_NO_URL = re.compile(r"\s*(?:$|#|data:|about:|blob:|javascript:)", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"(?<![^_.-])(?:blank|placeholders?|spacer|pixel|1x1|transparent|trans|clear|empty|dummy|gr[ae]y|loading|loader"
    r"|spinner|lazy|lazy-?load)(?![^_.-])",
    re.IGNORECASE,
)


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

    An ``img`` gives the largest candidate of its srcset, else its src. An attribute in which scripts that load late
    keep a link comes before, and a placeholder counts only if there is nothing else. Each ``source`` of a ``picture``
    gives its largest candidate.

    Args:
        content: bytes of the page.
        url: address of the page; if it is "", the page's canonical link or ``og:url`` is taken.
        charset: label of the encoding by the page's headers.
        agent: our name as a robot; a page may have a meta tag for it.
    """
    parser = require("resiliparse.parse.html", extra="curate", purpose="reading web pages")
    text, encoding = decode(content, charset)
    document = parser.HTMLTree.parse(text).document
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
    base = _joined(base, next(filter(None, (_value(element, "href").strip() for element in elements("base"))), ""))
    for element in elements("img, source"):
        if element.tag == "source" and (element.parent is None or element.parent.tag != "picture"):
            continue  # a source of a video; a selector for it would look at all ancestors
        for link in _links_of(element):
            links.setdefault(link.url, link._replace(url=_query_in(link.url, encoding)))
    return Page(base, robots, list(links.values()))


def _joined(page: str, base: str) -> str:
    """The URL that a page's links are relative to, if its ``base`` element says ``base``."""
    try:
        joined = urljoin(page, re.sub("[\t\r\n]", "", base).replace("\\", "/"))
        return joined if urlsplit(joined).scheme in ("http", "https", "") else page
    except ValueError:
        return page


def _query_in(url: str, encoding: str) -> str:
    """A link whose query is in the page's encoding, as browsers send it. Paths are always in UTF-8."""
    if url.isascii() or encoding.startswith("utf"):
        return url
    place, mark, query = url.partition("?")
    codec = WIDER.get(encoding, encoding)
    encoded = re.sub(r"[^\x00-\x7f]+", lambda found: quote(found[0].encode(codec, "xmlcharrefreplace"), ""), query)
    return place + mark + encoded


def _links_of(element: Any) -> Iterator[Link]:
    alt = " ".join(_value(element, "alt").split())[:MAX_ALT]
    found = [Link(url, alt, attribute) for attribute, url in _sources_of(element)]
    if len(found) > 1:
        found = [link for link in found if not is_placeholder(link.url)] or found
    yield from found[:1]


def _sources_of(element: Any) -> Iterator[tuple[str, str]]:
    """Attributes that have a link, and their links. The first that is no placeholder is the best."""
    present = set(element.attrs)  # by far most images have none of the many attributes of late loading
    for attribute in filter(present.__contains__, (*LATE_SETS, "srcset")):
        if largest := largest_candidate(_value(element, attribute)):
            yield attribute, largest
    if element.tag == "source":
        return
    for attribute in filter(present.__contains__, LATE_SOURCES):
        url = _value(element, attribute).strip()
        if ("/" in url or "." in url) and url[0] not in "{[":  # no flag such as "true", no JSON
            yield attribute, url
    if url := _value(element, "src").strip():
        yield "src", url


def is_placeholder(url: str) -> bool:
    """Whether a link is one of those that stand for an image until a script loads it: data:, or a name like blank.gif.

    An image may have such a name, so this only decides between several links for one image.
    """
    name = re.split("[?#]", url, maxsplit=1)[0].rpartition("/")[2]
    return bool(_NO_URL.match(url) or _PLACEHOLDER.search(name))


def _value(element: Any, attribute: str) -> str:
    """An attribute's value. It is looked up by name, because an element may have a million attributes."""
    return element.getattr(attribute) or ""


def largest_candidate(srcset: str) -> str | None:
    """The URL in a ``srcset`` with the largest width or density; among equals, the first. None if there is no URL.

    A comma within a URL belongs to it, unless it is the last character. So data: URLs stay whole. A candidate whose
    descriptor is malformed does not count, as in browsers. A placeholder counts only if all are placeholders.
    """
    best: tuple[tuple[bool, float], str] | None = None
    position = 0
    while candidate := _CANDIDATE.match(srcset, position):
        url, position, size = candidate[1], candidate.end(), 1.0
        if url.endswith(","):
            url = url.rstrip(",")
        else:
            descriptors = _DESCRIPTORS.match(srcset, position)
            assert descriptors is not None  # it matches anything, even nothing
            size, position = _size(descriptors[0]), descriptors.end()
        rank = not is_placeholder(url), size
        if url and size >= 0 and (best is None or rank > best[0]):
            best = rank, url
    return best[1] if best else None


def _size(descriptors: str) -> float:
    """The width or density that descriptors name: 1 if there are none, -1 if they are malformed."""
    match sorted(descriptors.split(), key=lambda word: word.endswith("h")):
        case []:
            return 1.0
        case [one] if found := _WIDTH.fullmatch(one) or _DENSITY.fullmatch(one):
            return float(found[1])
        case [one, other] if (found := _WIDTH.fullmatch(one)) and _HEIGHT.fullmatch(other):
            return float(found[1])
    return -1.0
