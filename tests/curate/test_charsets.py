"""The encoding of a page: byte order mark, then header, then meta element, by the labels of the Encoding Standard."""

from __future__ import annotations

import pytest

from dinov2.curate.charsets import charset_in, decode
from dinov2.curate.html import parse_page
from dinov2.curate.web import normal_url

TEXT = "\u4e2d\u6587\u56fe\u7247"


@pytest.mark.parametrize(
    ("page", "encoding", "header"),
    [
        ("<meta charset=gbk>{}", "gbk", None),
        ("<META  CHARSET = 'GB2312' />{}", "gbk", None),
        ('<meta name="a" content="b"><meta charset="x-gbk">{}', "gbk", None),
        ('<meta http-equiv="Content-Type" content="text/html; charset=gbk">{}', "gbk", None),
        ("<meta content='text/html;charset= \"gbk\"' http-equiv=content-type>{}", "gbk", None),
        ('<?xml version="1.0" encoding="gbk"?><html>{}', "gbk", None),
        ("<meta charset=big5>\u4e2d\u6587\u5716", "big5", None),
        ("<meta charset=x-sjis>\u65e5\u672c\u2460", "cp932", None),
        ("<meta charset=euc-kr>\ud55c\uad6d\ubdc1", "cp949", None),
        ("<meta charset=iso-8859-1>\u201ccaf\u00e9\u201d", "cp1252", None),
        ("{}", "gb18030", "GB2312"),
        ("\U0002000b{}", "gb18030", "gbk"),
        ("{}", "gbk", '"gbk"'),
        # the header comes before the meta element, and a byte order mark before both
        ("<meta charset=big5>{}", "gbk", "gbk"),
        ("<meta charset=gbk>{}", "utf-8-sig", "gbk"),
        ("<meta charset=gbk>{}", "utf-16", "gbk"),
        # labels that mean nothing, or not what they say
        ("<meta charset=gbk>{}", "gbk", "utf8mb4"),
        ("<meta charset=nonsense><meta charset=gbk>{}", "gbk", None),
        ("<meta charset=utf-16>{}", "utf-8", None),
        ("<!-- <meta charset=big5> --><meta charset=gbk>{}", "gbk", None),
        ('<meta name=description content="charset=big5">{}', "utf-8", None),
        ("<meta charset=shift_jis>{}", "utf-8", None),  # its bytes are UTF-8, and no Shift_JIS
        ("{}", "utf-8", None),
    ],
)
def test_encodings(page: str, encoding: str, header: str | None) -> None:
    page = page.replace("{}", TEXT)
    assert decode(page.encode(encoding), header)[0] == page


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "shift_jis"])
def test_a_page_that_is_cut_within_a_character(encoding: str) -> None:
    page = f"<meta charset={encoding}>" * (encoding != "utf-8") + "\u65e5\u672c" * 10
    assert decode(page.encode(encoding)[:-1])[0].rstrip("\ufffd") == page[:-1]


def test_one_wrong_byte_costs_one_character() -> None:
    page = f"<meta charset=gbk>{TEXT}".encode("gbk")
    assert decode(page + b"\xff" + b"<p>")[0].replace("\ufffd", "") == f"<meta charset=gbk>{TEXT}<p>"


@pytest.mark.parametrize(
    ("header", "label"),
    [
        ("text/html; charset=GBK", "GBK"),
        ('text/html;charset="gbk"', "gbk"),
        ("text/html; Charset = gbk ; x=y", "gbk"),
        ("text/html", None),
    ],
)
def test_labels_in_headers(header: str, label: str | None) -> None:
    assert charset_in(header) == label


def test_links_of_such_pages() -> None:
    """Paths are sent in UTF-8, queries in the page's encoding (URL Standard); what that lacks is a reference."""
    page = f"<meta charset=gbk><img src='{TEXT[0]}.jpg?q={TEXT[0]}&e=&eacute;&#x1f600;' alt='{TEXT}'>".encode("gbk")
    (link,) = parse_page(page, "http://site.org/").links
    assert link.alt == TEXT
    sent = normal_url(link.url, "http://site.org/")
    assert sent.startswith("http://site.org/%E4%B8%AD.jpg?q=%D6%D0&e=")
    (link,) = parse_page("<meta charset=latin1><img src='x?q=\u00e9&#x4e2d;'>".encode("latin-1"), "").links
    assert link.url == "x?q=%E9%26%2320013%3B"


def test_a_hostile_page_is_read_in_time() -> None:
    for content in (b"<!--" * 50_000, b"<meta " * 50_000, b"<meta a=" * 50_000, b"<?xml " + b"encoding " * 50_000):
        decode(content)
