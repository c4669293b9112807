"""Files of pages become tables of links, damaged ones as far as they can be read."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from pathlib import Path

import pytest

from dinov2.curate import run_steps
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.extract import ExtractConfig, StorageError, Troubles, extract, read_html, read_warc
from dinov2.curate.pool import read_skipped, read_table
from dinov2.curate.steps import Counts
from dinov2.curate.web import read_domains
from dinov2.data import BrokenLinkWarning
from dinov2.data.shards.storage import Storage
from tests.curate.test_runner import contents

PAGE = b"<img src=1.jpg>" + b"." * 100
ZIPPED = gzip.compress(PAGE)


def record(kind: str, url: str, content: bytes, media: str) -> bytes:
    """A record of a WARC file."""
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {media}\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"


def response(url: str, html: str, headers: str = "") -> bytes:
    body = html.encode()
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return record("response", url, http.encode() + body, "application/http; msgtype=response")


LINK = {"path": "IMG@/src", "url": "x.jpg"}


def wat(url: str, headers: object = None, **html: object) -> bytes:
    envelope = {
        "WARC-Header-Metadata": {"WARC-Target-URI": url},
        "Payload-Metadata": {"HTTP-Response-Metadata": {"Headers": headers, "HTML-Metadata": html}},
    }
    return record("metadata", "http://x", json.dumps({"Envelope": envelope}).encode(), "application/json")


def run(pages: Path, output: Path, **settings: object) -> list[tuple[str, str, str]]:
    folder = run_steps(extract(str(pages), ExtractConfig(**settings), str(output)), Inline())  # type: ignore[arg-type]
    rows = []
    for shard in Storage(folder).files("", ".parquet"):
        table = read_table(folder, shard)
        rows += list(zip(*(table[name].to_pylist() for name in ("url", "page", "alt")), strict=True))
    return sorted(rows)


def counts(output: Path, step: str) -> Counts:
    total = Counts()
    for file in output.glob(f"{step}-*/*.json"):
        total += Counts(**json.loads(file.read_text()))
    return total


def test_every_kind_of_file(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    (pages / "deep" / "er").mkdir(parents=True)
    (pages / "a.html").write_text('<img src="a.jpg" alt="an a">')
    (pages / "deep" / "b.htm.gz").write_bytes(gzip.compress(b'<img src="/b.jpg">'))
    archive = response("http://w.org/p/", "<img src=c.jpg>") + response("http://w.org/q/", "<img src=/p/c.jpg>")
    binary = record(
        "response", "http://w.org/i", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\nxx", "application/http"
    )
    (pages / "deep" / "er" / "c.warc.gz").write_bytes(gzip.compress(archive) + gzip.compress(binary))
    (pages / "d.warc.wat").write_bytes(
        wat(
            "http://v.org/x/",
            Links=[{"path": "IMG@/src", "url": "d.jpg", "alt": "dee"}, {"path": "A@/href", "url": "no"}, 7],
        )
    )
    (pages / "e.warc").write_bytes(response("http://w.org/r/", "<img src=/p/c.jpg>"))
    (pages / "notes.txt").write_text("<img src=no.jpg>")
    assert run(pages, tmp_path / "out", base_url="http://h.org/") == [
        ("http://h.org/a.jpg", "http://h.org/a.html", "an a"),
        ("http://h.org/b.jpg", "http://h.org/deep/b.htm.gz", ""),
        ("http://v.org/x/d.jpg", "http://v.org/x/", "dee"),
        ("http://w.org/p/c.jpg", "http://w.org/p/", ""),
    ]
    assert counts(tmp_path / "out", "extract-links").dropped == {"repeated link": 1}  # in one file
    assert counts(tmp_path / "out", "extract-unique").dropped == {"repeated link": 1}  # in two
    assert counts(tmp_path / "out", "extract-links").figures == {"no HTML": 1, "pages": 6}
    run_steps(extract(str(pages), ExtractConfig(base_url="http://h.org/"), str(tmp_path / "two")), ProcessPool(2))
    assert contents(tmp_path / "out") == contents(tmp_path / "two")


def test_encodings_by_header_and_by_page(tmp_path: Path) -> None:
    """In an archive the header counts before the page; a page in XHTML may name its encoding as XML does."""
    pages, html = tmp_path / "pages", "<meta charset=gbk><img src=x.jpg alt=\u4e2d\u6587>"
    pages.mkdir()
    (pages / "plain.html").write_text(html.replace("x.jpg", "plain.jpg"), encoding="gbk")
    bodies = [
        ('text/html; charset="GB2312"', html.replace("x", "quoted").replace("charset=gbk", ""), "gbk"),
        ("text/html; charset=big5", html.replace("x", "other").replace("\u6587", "\u5716"), "big5"),
        ("application/xhtml+xml", f'<?xml version="1.0" encoding="gbk"?>{html.replace("x.", "xml.")}', "gbk"),
    ]
    archive = b"".join(
        record(
            "response",
            "http://w.org/p/",
            f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode() + body.encode(encoding),
            "application/http; msgtype=response",
        )
        for kind, body, encoding in bodies
    )
    (pages / "some.warc").write_bytes(archive)
    rows = run(pages, tmp_path / "out", base_url="http://h.org")
    texts = {url.rpartition("/")[2]: alt for url, _, alt in rows}
    whole = "\u4e2d\u6587"
    assert texts == {"plain.jpg": whole, "quoted.jpg": whole, "other.jpg": "\u4e2d\u5716", "xml.jpg": whole}


def test_pages_that_opt_out_and_blocked_domains(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    archive = [
        response("http://a.org/", "<meta name=robots content=noimageai><img src=1.jpg>"),
        response("http://b.org/", "<img src=2.jpg>", "X-Robots-Tag: noindex\r\n"),
        response("http://c.org/", "<img src=3.jpg><img src=http://x.bad.example/4.jpg>"),
        response("http://bad.example/", "<img src=http://c.org/5.jpg>"),
    ]
    (pages / "a.warc").write_bytes(b"".join(archive))
    (tmp_path / "blocked.txt").write_text("bad.example")
    blocked = str(tmp_path / "blocked.txt")
    assert [url for url, *_ in run(pages, tmp_path / "out", blocked_domains=blocked)] == ["http://c.org/3.jpg"]
    assert counts(tmp_path / "out", "extract-links").dropped == {"blocked domain": 2, "page opted out": 2}
    assert len(run(pages, tmp_path / "free", honour_opt_out=False)) == 5
    (tmp_path / "allowed.txt").write_text("c.org\nexample")
    some = run(pages, tmp_path / "some", blocked_domains=blocked, allowed_domains=str(tmp_path / "allowed.txt"))
    assert [url for url, *_ in some] == ["http://c.org/3.jpg"]
    (tmp_path / "blocked.txt").write_text("c.org")  # what the list holds counts, not its name
    read_domains.cache_clear()
    assert run(pages, tmp_path / "out", blocked_domains=blocked) == []


def test_robots_that_are_named(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    html = [
        response("http://a.org/", "<meta name=Our-Bot content=noai><img src=1.jpg>"),
        response("http://b.org/", "<meta name=otherbot content=noai><img src=2.jpg>"),
        response("http://c.org/", "<img src=3.jpg>", "X-Robots-Tag: our-bot: noai\r\nX-Robots-Tag: nofollow\r\n"),
    ]
    (pages / "a.warc").write_bytes(b"".join(html))
    (pages / "b.wat").write_bytes(
        wat("http://d.org/", headers={"x-robots-tag": ["nofollow", "our-bot: noai"]}, Links=[LINK])
        + wat("http://e.org/", Head={"Metas": [{"name": "OUR-BOT", "content": "noai"}]}, Links=[LINK])
        + wat("http://f.org/", Head={"Metas": [{"name": "otherbot", "content": "noai"}]}, Links=[LINK])
    )
    assert [url for url, *_ in run(pages, tmp_path / "out", agent="our-bot")] == [
        "http://b.org/2.jpg",
        "http://f.org/x.jpg",
    ]


def test_damage_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    long = "<img src=3.jpg>" + " ".join(map(str, range(500)))
    whole = gzip.compress(response("http://w.org/", "<img src=1.jpg>"))
    (pages / "cut.warc.gz").write_bytes(whole + gzip.compress(response("http://u.org/", long))[:-60])
    (pages / "cut.warc").write_bytes(response("http://w.org/", "<img src=1.jpg>")[:150])
    (pages / "garbage.warc.gz").write_bytes(b"\x1f\x8bnot gzip at all")
    (pages / "garbage.warc").write_bytes(bytes(range(256)) * 20)
    (pages / "empty.warc").write_bytes(b"")
    (pages / "bad.wat").write_bytes(record("metadata", "http://v.org", b"{not json", "application/json"))
    (pages / "list.wat").write_bytes(record("metadata", "http://v.org", b"[1, 2]", "application/json"))
    (pages / "cut.html.gz").write_bytes(gzip.compress(b"<img src=http://x.org/2.jpg>")[:-12])
    (pages / "null.html").write_bytes(b"\0" * 1000)
    assert [url for url, *_ in run(pages, tmp_path / "out")] == ["http://u.org/3.jpg", "http://w.org/1.jpg"]
    figures = counts(tmp_path / "out", "extract-links").figures
    assert figures["damaged archive"] == 4  # one that is cut off, two of garbage, and the HTML
    assert figures["no HTML"] == 3  # one of them is cut off before it could say what it is


@pytest.mark.parametrize(
    ("http", "reason"),
    [
        (b"HTTP/1.1 301 Moved\r\nLocation: /x\r\n\r\n", "no HTML"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "no HTML"),
        (b"HTTP/1.1 304 Not Modified\r\n", "no HTML"),
        (b"", "no HTML"),
        (None, "damaged archive"),
    ],
    ids=["redirect", "no content", "not modified", "empty", "cut off"],
)
def test_answers_without_a_body_are_no_damage(tmp_path: Path, http: bytes | None, reason: str) -> None:
    (tmp_path / "pages").mkdir()
    page = response("http://w.org/", "<img src=1.jpg>")
    odd = page[:60] if http is None else record("response", "http://w.org/", http, "application/http; msgtype=response")
    (tmp_path / "pages" / "a.warc").write_bytes(page + odd)
    assert [url for url, *_ in run(tmp_path / "pages", tmp_path / "out")] == ["http://w.org/1.jpg"]
    assert counts(tmp_path / "out", "extract-links").figures == {"pages": 1, reason: 1}


def test_files_and_pages_with_trouble_are_named(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    brotli = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: br\r\n\r\nxx"
    long = response("http://w.org/long", "<p>" * 1000)
    (pages / "a.warc").write_bytes(record("response", "http://w.org/br", brotli, "application/http") + long)
    (pages / "b.warc.gz").write_bytes(b"\x1f\x8bnot gzip at all")
    (pages / "c.html").symlink_to("nowhere")
    with pytest.warns(BrokenLinkWarning):
        run(pages, tmp_path / "out", max_page_bytes=1000)
    (folder,) = (tmp_path / "out").glob("extract-links-*")
    named = [row for number in range(3) for row in read_skipped(str(folder), f"{number:05d}").to_pylist()]
    assert sorted(tuple(row.values()) for row in named) == [
        ("b.warc.gz", "damaged archive", ""),
        ("c.html", "cannot be opened", "No such file or directory"),
        ("http://w.org/br", "unknown encoding", "in a.warc; br"),
        ("http://w.org/long", "page too large", "in a.warc"),
    ]


def test_a_bomb_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    start = b"<img src=http://x.org/1.jpg>"
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=9) as bomb:
        bomb.write(start)
        for _ in range(50):
            bomb.write(b" " * 1_000_000)
    (pages / "bomb.html.gz").write_bytes(file.getvalue())
    assert [url for url, *_ in run(pages, tmp_path / "out", max_page_bytes=100_000)] == ["http://x.org/1.jpg"]
    assert counts(tmp_path / "out", "extract-links").figures["page too large"] == 1


def test_damage_within_a_record(tmp_path: Path) -> None:
    """The beginning of a page is read, and the pages before; where the next begins, nobody can say."""
    pages = tmp_path / "pages"
    pages.mkdir()
    long = "<img src=2.jpg>" + " ".join(str(number * 7919 % 10007) for number in range(100_000))
    broken = bytearray(gzip.compress(response("http://w.org/", long)))
    broken[-3000:-2900] = b"\xff" * 100
    before, after = (gzip.compress(response("http://w.org/", f"<img src={n}.jpg>")) for n in (1, 3))
    (pages / "a.warc.gz").write_bytes(before + bytes(broken) + after)
    checksum = bytearray(gzip.compress(wat("http://v.org/", Links=[LINK])))
    checksum[-6] ^= 1
    (pages / "b.wat.gz").write_bytes(gzip.compress(wat("http://u.org/", Links=[LINK])) + checksum)
    assert [url for url, *_ in run(pages, tmp_path / "out")] == [
        "http://u.org/x.jpg",
        "http://w.org/1.jpg",
        "http://w.org/2.jpg",
    ]
    assert counts(tmp_path / "out", "extract-links").figures == {"damaged archive": 2, "pages": 3}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("Content-Encoding: gzip\r\n", gzip.compress(PAGE)),
        ("Content-Encoding: deflate\r\n", zlib.compress(PAGE)),
        (
            "Transfer-Encoding: chunked\r\n",
            b"8;x=y\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (PAGE[:8], len(PAGE[8:]), PAGE[8:]),
        ),
        (
            "Transfer-Encoding: chunked\r\nContent-Encoding: identity, gzip\r\n",
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(ZIPPED), ZIPPED),
        ),
        ("Content-Encoding: gzip\r\n", PAGE),  # decoded already
        ("Transfer-Encoding: chunked\r\n", PAGE),
        ("Transfer-Encoding: chunked\r\n", b"ffffffffffffffff\r\n" + PAGE),
        ("Content-Encoding: gzip\r\n", gzip.compress(PAGE + b" " * 50_000_000)),
        ("Content-Encoding: gzip\r\n", gzip.compress(PAGE * 1000)[:-30]),
    ],
    ids=[  # a gzip header holds the second it was made in: no name of a test may come from it
        "gzip",
        "deflate",
        "chunked",
        "gzip and chunked",
        "gzip decoded already",
        "chunks joined already",
        "a chunk too long",
        "a bomb",
        "gzip cut short",
    ],
)
def test_bodies_as_they_were_sent(tmp_path: Path, headers: str, body: bytes) -> None:
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n{headers}\r\n".encode() + body
    archive = record("response", "http://w.org/", http, "application/http; msgtype=response")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.warc").write_bytes(archive + response("http://w.org/", "<img src=2.jpg>"))
    found = run(tmp_path / "pages", tmp_path / "out", max_page_bytes=100_000)
    assert [url for url, *_ in found] == ["http://w.org/1.jpg", "http://w.org/2.jpg"]


def test_hostile_values(tmp_path: Path) -> None:
    """None of them costs the links of others."""
    pages = tmp_path / "pages"
    pages.mkdir()
    values: list[bytes] = [
        wat("http://a.org/", headers=7, Links=[LINK]),
        wat("http://b.org/", Head={"Metas": 7}, Links=[LINK]),
        wat("http://c.org/", Head=[1], Links={"path": 1}),
        wat("http://d.org/\ud800", Links=[LINK | {"alt": "\udc80"}, LINK | {"url": "y\ud800"}]),
        wat("http://[::1", Links=[LINK, LINK | {"url": "http://e.org/e.jpg"}]),
        record("metadata", "http://f.org", b"[" * 200_000, "application/json"),
        wat("<http://g.org/>", Links=[LINK]),
    ]
    (pages / "a.wat").write_bytes(b"".join(values))
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: br\r\n\r\nxx"
    (pages / "b.warc").write_bytes(record("response", "http://h.org/", http, "application/http"))
    (pages / os.fsdecode(b"c\xff\xe9 #?%.html")).write_bytes(b"<img src=1.jpg>")
    (pages / "d.html").symlink_to(tmp_path / "nowhere")
    os.mkfifo(pages / "e.warc")
    (tmp_path / "blocked.txt").write_text("bad.example")
    found = run(pages, tmp_path / "out", base_url="http://i.org", blocked_domains=str(tmp_path / "blocked.txt"))
    assert found == [
        ("http://d.org/x.jpg", "http://d.org/?", "?"),
        ("http://e.org/e.jpg", "http://[::1", ""),
        ("http://g.org/x.jpg", "http://g.org/", ""),
        ("http://i.org/1.jpg", "http://i.org/c%FF%E9%20%23%3F%25.html", ""),
    ]
    result = counts(tmp_path / "out", "extract-links")
    assert result.dropped == {"malformed URL": 1, "relative URL of an unknown page": 1}
    assert result.figures == {"cannot be opened": 2, "no HTML": 4, "pages": 5, "unknown encoding": 1}


def test_storage_that_fails_is_no_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 0:
                raise ConnectionResetError("gone")
            return super().read(min(size or -1, 10))

    content = response("http://w.org/", "<img src=1.jpg>") * 2
    with pytest.raises(StorageError, match="ConnectionResetError: gone"):
        list(read_warc(Failing(content), ExtractConfig(), Troubles()))
    with pytest.raises(ConnectionResetError):
        list(read_html(Failing(gzip.compress(content)), "a.html.gz", "", ExtractConfig(), Troubles()))


def test_many_links_meet_in_ranges_of_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tasks share the work, each link is there once, in the same order."""
    pages = tmp_path / "pages"
    pages.mkdir()
    for file in range(3):
        images = "".join(f"<img src={number}.jpg alt={file}>" for number in range(file, 12_000, file + 1))
        (pages / f"{file}.warc").write_bytes(response("http://w.org/", images))
    tables = []
    for per_bucket in (100_000, 700):
        monkeypatch.setattr("dinov2.curate.extract.PER_BUCKET", per_bucket)
        folder = run_steps(extract(str(pages), ExtractConfig(), str(tmp_path / "out")), Inline())
        shards = Storage(folder).files("", ".parquet")
        tables.append([row for shard in shards for row in read_table(folder, shard).to_pylist()])
    assert len(shards) > 20
    assert tables[0] == tables[1]
    assert [row["alt"] for row in tables[0]] == ["0"] * 12_000  # where it came first
    assert len({row["url"] for row in tables[0]}) == 12_000


def test_no_pages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pages: expected a folder of HTML, WARC or WAT files"):
        run_steps(extract(str(tmp_path), ExtractConfig(), str(tmp_path / "out")), Inline())
