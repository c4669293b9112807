"""Links in pages: where they may stand, what they are relative to, and what malformed pages do not break."""

from __future__ import annotations

import pytest

from dinov2.curate.html import largest_candidate, parse_page
from dinov2.curate.web import RefusedURLError, is_blocked, normal_url, opts_out, read_domains


def links(html: str, url: str = "http://site.org/a/b.html") -> list[str]:
    page = parse_page(html.encode(), url)
    return [normal_url(link.url, page.base) for link in page.links]


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ('<img src="x.jpg">', "http://site.org/a/x.jpg"),
        ("<IMG SRC='/x.jpg'>", "http://site.org/x.jpg"),
        ('<img src="//cdn.net/x.jpg#part">', "http://cdn.net/x.jpg"),
        ('<base href="/other/"><img src="x.jpg">', "http://site.org/other/x.jpg"),
        ('<img src="s.gif" data-src="late.jpg">', "http://site.org/a/late.jpg"),
        ('<img data-original="late.jpg">', "http://site.org/a/late.jpg"),
        ('<img src="s.jpg" srcset="m.jpg 640w, l.jpg 1280w, xs.jpg 64w">', "http://site.org/a/l.jpg"),
        ('<img data-srcset="m.jpg 1x,l.jpg 2x">', "http://site.org/a/l.jpg"),
        ('<picture><source srcset="l.webp"><img></picture>', "http://site.org/a/l.webp"),
        ('<img src=" x y.jpg\n">', "http://site.org/a/x%20y.jpg"),
        # what scripts that load late put in, and what stands there until then
        ('<img srcset="data:image/gif;base64,R0lGOD 1w" data-srcset="m.jpg 1x, l.jpg 2x">', "http://site.org/a/l.jpg"),
        ('<img srcset="blank.gif 1x" data-srcset="m.jpg 1x, l.jpg 2x">', "http://site.org/a/l.jpg"),
        ('<img srcset="small.jpg 2000w" data-srcset="l.jpg 640w">', "http://site.org/a/l.jpg"),
        ('<img srcset="data:image/gif;base64,R0lGOD 1w" src="x.jpg">', "http://site.org/a/x.jpg"),
        ('<img srcset="/i/1x1.gif?v=2 2x" src="x.jpg">', "http://site.org/a/x.jpg"),
        ('<img srcset="placeholder-300x200.png 2x" data-src="x.jpg">', "http://site.org/a/x.jpg"),
        ('<img srcset="data:image/gif;base64,R0lGOD 9x, x.jpg 1x">', "http://site.org/a/x.jpg"),
        ('<img src="x.jpg" srcset="x@2x.jpg 2x">', "http://site.org/a/x@2x.jpg"),
        ('<img src="s.gif" data-lazy-src="x.jpg">', "http://site.org/a/x.jpg"),
        ('<img src="s.gif" data-src="data:image/gif;base64,R0" data-original="x.jpg">', "http://site.org/a/x.jpg"),
        ('<img src="x.jpg" data-lazy="true">', "http://site.org/a/x.jpg"),
        ('<img src="x.jpg" data-image=\'{"a": "b/c.jpg"}\'>', "http://site.org/a/x.jpg"),
        ('<img src="loading.gif">', "http://site.org/a/loading.gif"),
        ('<noscript><img src="x.jpg"></noscript>', "http://site.org/a/x.jpg"),
        ('<picture><source srcset="data:," data-srcset="l.webp 2x"></picture>', "http://site.org/a/l.webp"),
        ('<img src="a?b=1&amp;c=&#x4e2d;&copy=2">', "http://site.org/a/a?b=1&c=%E4%B8%AD&copy=2"),
        # bases
        ('<base href=" /other/\n"><img src="x.jpg">', "http://site.org/other/x.jpg"),
        ('<base href="\\\\cdn.net\\i\\"><img src="x.jpg">', "http://cdn.net/i/x.jpg"),
        ('<base target="_top"><base href="/other/"><img src="x.jpg">', "http://site.org/other/x.jpg"),
        ('<base href="javascript:void(0)"><img src="x.jpg">', "http://site.org/a/x.jpg"),
        ('<base href="http://[::1"><img src="x.jpg">', "http://site.org/a/x.jpg"),
        ('<div><p><img src="x.jpg"', None),
        ('<video><source srcset="x.mp4"></video>', None),
    ],
)
def test_where_links_stand(html: str, expected: str | None) -> None:
    assert links(html) == ([] if expected is None else [expected])


def test_each_link_once_with_its_text() -> None:
    page = parse_page(b'<img src=x alt=" two\n words "><img src=x alt=other>', "http://s.org/")
    assert [(link.alt, link.attribute) for link in page.links] == [("two words", "src")]
    assert len(parse_page(f'<img src=x alt="{"a" * 10_000}">'.encode(), "").links[0].alt) == 500


def test_pages_that_say_where_they_are_from() -> None:
    assert links('<link rel="canonical" href="http://home.org/p/"><img src=x>', "") == ["http://home.org/p/x"]
    assert links('<meta property="og:url" content="http://home.org/q/"><img src=x>', "") == ["http://home.org/q/x"]
    with pytest.raises(RefusedURLError, match="relative URL of an unknown page"):
        links("<img src=x>", "")


def test_pages_of_very_many_images() -> None:
    page = parse_page("".join(f"<img src={number}.jpg>" for number in range(20_000)).encode(), "http://s.org/")
    assert len(page.links) == 20_000


@pytest.mark.parametrize("charset", ["utf-16", "nonsense", None, "latin-1"])
def test_any_bytes_are_a_page(charset: str | None) -> None:
    for content in (
        b"",
        b"\xff\xfe\x00",
        b"<img src=" * 1000,
        b"\0" * 100,
        b"<div>" * 100_000,
        "<img src='é'>".encode("latin-1"),
    ):
        parse_page(content, "http://s.org/", charset)


@pytest.mark.parametrize(
    ("srcset", "expected"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg 1x, b.jpg 3x, c.jpg 2x", "b.jpg"),
        ("a,b.jpg 100w, c,d.jpg 200w", "c,d.jpg"),
        ("a.jpg, b.jpg 2x", "b.jpg"),
        ("a.jpg 1x,b.jpg 2x,c.jpg 3x", "c.jpg"),
        ("a.jpg wide, b.jpg 2x", "b.jpg"),
        ("a.jpg .5x, b.jpg 1.5x, c.jpg 1e0x", "b.jpg"),
        ("a.jpg 100w 50h, b.jpg 60h 120w", "b.jpg"),
        ("a.jpg\t100w\n,\f\rb.jpg   200w", "b.jpg"),
        ("a\u00a0b.jpg 2x, c.jpg 1x", "a\u00a0b.jpg"),  # no-break spaces separate nothing
        ("a.jpg 1x (b, c) , d.jpg 1x", "d.jpg"),
        ("a.jpg 100w 2x, b.jpg 10w", "b.jpg"),
        ("a.jpg 0w, b.jpg -1x, c.jpg 640, d.jpg 640px, e.jpg 1.5w", None),
        ("my photo.jpg 640w", None),
        ("data:,a 2x, blank.gif 3x", "blank.gif"),
        ("  , ,", None),
        ("", None),
    ],
)
def test_srcset(srcset: str, expected: str | None) -> None:
    assert largest_candidate(srcset) == expected


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("HTTP://User:Pass@Example.ORG.:80/%7Ea?b=c d#e", "http://example.org/%7Ea?b=c%20d"),
        ("http://stra\u00dfe.de/", "http://xn--strae-oqa.de/"),  # as browsers, which left strasse.de in 2016
        ("http://\u65e5\u672c\u8a9e\u3002jp/", "http://xn--wgv71a119e.jp/"),
        ("http://\u2603.net/", "http://xn--n3h.net/"),
        ("https://münchen.de:8443", "https://xn--mnchen-3ya.de:8443/"),
        ("http://[2001:DB8::0:1]/x", "http://[2001:db8::1]/x"),
        ("http://x.org/caf\u00e9/%E9%zz?\u4e2d='\"<", "http://x.org/caf%C3%A9/%E9%zz?%E4%B8%AD='%22%3C"),
        ("http:\\\\x.org\\a.jpg?b\\c", "http://x.org/a.jpg?b%5Cc"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://0177.0.0.1./", "http://127.0.0.1/"),
        ("http://\uff11\uff12\uff17.1/", "http://127.0.0.1/"),
        ("http://4chan.7up.org", "http://4chan.7up.org/"),
    ],
)
def test_normal_urls(link: str, expected: str) -> None:
    assert normal_url(link) == expected
    assert normal_url(expected) == expected


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("data:image/png;base64,AAAA", "data: URL"),
        ("javascript:alert(1)", "other scheme"),
        ("file:///etc/passwd", "other scheme"),
        ("http://", "malformed URL"),
        ("http://x:port/", "malformed URL"),
        ("http://[::1", "malformed URL"),
        ("http://" + "é" * 70 + ".org/", "malformed URL"),
        ("http://x.org/" + "a" * 3000, "too long URL"),
        ("http://x.org/\x00", "malformed URL"),
        ("http://" + "a." * 200 + "org/", "malformed URL"),
        ("http://a..b/", "malformed URL"),
        ("http://1.2.3.4.5/", "malformed URL"),
        ("http://256.0.0.1/", "malformed URL"),
        ("http://127%2e0%2e0%2e1/", "malformed URL"),
        ("http://127.0.0.1\x85.org/", "malformed URL"),
        ("http://[fe80::1%25eth0]/", "malformed URL"),
        ("http://x.org/\udcff", "malformed URL"),  # bytes that were no UTF-8
        ("relative", "relative URL of an unknown page"),
    ],
)
def test_refused_urls(link: str, reason: str) -> None:
    with pytest.raises(RefusedURLError) as refusal:
        normal_url(link)
    assert refusal.value.reason == reason


def test_domains_and_those_below_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("domains") / "blocked.txt"
    file.write_text("# unsafe\nBad.example \n\n.worse.org # and below\nm\u00fcnchen.de\n")
    domains = read_domains(str(file))
    assert domains == {"bad.example", "worse.org", "xn--mnchen-3ya.de"}
    assert is_blocked(normal_url("http://www.M\u00dcNCHEN.de/"), domains)
    assert is_blocked("http://bad.example/x", domains)
    assert is_blocked("http://a.b.worse.org:8080/x", domains)
    assert not is_blocked("http://notbad.example/x", domains)
    assert not is_blocked("http://example/x", domains)
    assert read_domains("") == frozenset()
    file.write_bytes(b"\xef\xbb\xbfbad.example\r\nworse.org")
    read_domains.cache_clear()
    assert read_domains(str(file)) == {"bad.example", "worse.org"}
    odd = file.with_name("odd.txt")
    odd.write_text("fine.org\nhttp://not.a/domain\n")
    with pytest.raises(ValueError, match=r".*: expected one domain a line, got 'http://not.a/domain' in line 2"):
        read_domains(str(odd))


@pytest.mark.parametrize(
    ("headers", "out"),
    [
        (["noai"], True),
        (["index, follow"], False),
        (["NOINDEX, nofollow"], True),
        (["otherbot: noai"], False),
        (["dinov2: noai"], True),
        (["otherbot: noindex, noai"], False),
        (["unavailable_after: 25 Jun 2026 15:00:00 PST"], False),
        (["unavailable_after: Wed, 25 Jun 2026 15:00:00 PST, noai"], True),
        (["index, follow, max-image-preview:large, max-snippet:-1, noai"], True),
        (["otherbot: nofollow, dinov2: noai"], True),
        (["nofollow noindex"], True),
        (["nofollow; noindex"], True),
        (["dinov2: nofollow noindex"], True),
        (["otherbot: nofollow noindex"], False),
        (["otherbot: max-snippet: 5, noai"], False),
        (["otherbot: noai", "noimageai"], True),
        ([], False),
    ],
)
def test_opt_out(headers: list[str], out: bool) -> None:
    assert opts_out(headers, ("noai", "noimageai", "noindex"), "dinov2") == out
