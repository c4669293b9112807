"""Text of web pages: the encoding of their bytes, by the rules of browsers (Encoding Standard, HTML Standard).

A byte order mark comes first, then the header of the server, then a ``meta`` element or an XML declaration. Names are
labels of the Encoding Standard, which are not Python's: ``gb2312`` is GBK, ``iso-8859-1`` is Windows-1252.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import suppress

from dinov2.extras import require

MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
WIDER = {"gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"}
"""Python's codec of the same name lacks characters that browsers read in these encodings."""

HEAD = 65_536  # bytes in which a page may name its encoding

_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
_DECLARATION = re.compile(rb"\s*<\?xml\s[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<meta[\s/]([^>]*)", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"([^\s=/\"']+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))")


def decode(content: bytes, charset: str | None = None) -> tuple[str, str]:
    """The text of a page and the name of its encoding.

    A page whose bytes do not fit what it says is UTF-8 if its bytes fit that. A page that says nothing is UTF-8, or the
    encoding is guessed. The last character may be cut off, as in a page that was not read to its end.

    Args:
        content: bytes of the page.
        charset: label in the header of the server, or None.
    """
    for mark, name in MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(name, "replace"), name
    stated = name_of(charset or "") or declared(content)
    for name in filter(None, (stated, "utf-8")):
        with suppress(UnicodeDecodeError):
            return codecs.getincrementaldecoder(WIDER.get(name, name))().decode(content), name
    name = stated or _guessed(content)
    return content.decode(WIDER.get(name, name), "replace"), name


def charset_in(content_type: str) -> str | None:
    """The label in a Content-Type, such as ``gbk`` in ``text/html; charset="gbk"``; None if there is none."""
    found = _CHARSET.search(content_type)
    return found[1] if found else None


def declared(content: bytes) -> str | None:
    """The encoding that a page names itself, in its first ``meta`` element or XML declaration with a known label.

    The name could be read, so the encoding has ASCII's letters. A page that calls itself UTF-16 there is UTF-8.
    """
    head = _without_comments(content[:HEAD])
    declaration = _DECLARATION.match(head)
    labels = [declaration[1].decode("ascii", "replace")] if declaration else []
    name = next(filter(None, map(name_of, (*labels, *_labels_in_meta(head)))), None)
    return "utf-8" if name in ("utf-16-le", "utf-16-be") else name


def name_of(label: str) -> str | None:
    """Python's name of an encoding by its label in the Encoding Standard; None for any other label."""
    encoding = require("resiliparse.parse.encoding", extra="curate", purpose="reading web pages")
    name: str | None = encoding.map_encoding_to_html5(label.strip(" \t\r\n\f\"'"), fallback_utf8=False)
    return name


def _guessed(content: bytes) -> str:
    encoding = require("resiliparse.parse.encoding", extra="curate", purpose="reading web pages")
    return encoding.detect_encoding(content) or "utf-8"


def _labels_in_meta(head: bytes) -> Iterator[str]:
    for tag in _META.finditer(head):
        attributes: dict[str, str] = {}
        for name, *values in _ATTRIBUTE.findall(tag[1].decode("latin-1")):
            attributes.setdefault(name.lower(), "".join(values))
        if "charset" in attributes:
            yield attributes["charset"]
        elif attributes.get("http-equiv", "").strip().lower() == "content-type":
            yield charset_in(attributes.get("content", "")) or ""


def _without_comments(head: bytes) -> bytes:
    parts, place = list[bytes](), 0
    while (start := head.find(b"<!--", place)) >= 0:
        parts.append(head[place:start])
        end = head.find(b"-->", start + 2)  # <!--> is a whole comment
        place = len(head) if end < 0 else end + 3
    return b"".join([*parts, head[place:]])
