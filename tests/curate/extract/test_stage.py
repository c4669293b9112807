"""Files of pages become tables of links, damaged ones as far as they can be read."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest

from dinov2.curate import run_steps
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.extract import ExtractConfig, extract
from dinov2.curate.pool import read_table
from dinov2.curate.steps import Counts
from dinov2.data.shards.storage import Storage
from tests.curate.test_runner import contents


def record(kind: str, url: str, content: bytes, media: str) -> bytes:
    """A record of a WARC file."""
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {media}\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content + b"\r\n\r\n"


def response(url: str, html: str, headers: str = "") -> bytes:
    body = html.encode()
    http = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return record("response", url, http.encode() + body, "application/http; msgtype=response")


def wat(url: str, **html: object) -> bytes:
    envelope = {
        "WARC-Header-Metadata": {"WARC-Target-URI": url},
        "Payload-Metadata": {"HTTP-Response-Metadata": {"Headers": {}, "HTML-Metadata": html}},
    }
    return record("metadata", url, json.dumps({"Envelope": envelope}).encode(), "application/json")


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
    (pages / "notes.txt").write_text("<img src=no.jpg>")
    assert run(pages, tmp_path / "out", base_url="http://h.org/") == [
        ("http://h.org/a.jpg", "http://h.org/a.html", "an a"),
        ("http://h.org/b.jpg", "http://h.org/deep/b.htm.gz", ""),
        ("http://v.org/x/d.jpg", "http://v.org/x/", "dee"),
        ("http://w.org/p/c.jpg", "http://w.org/p/", ""),
    ]
    assert counts(tmp_path / "out", "extract-unique").dropped == {"repeated link": 1}
    assert counts(tmp_path / "out", "extract-links").figures == {"no HTML": 1, "pages": 5}
    run_steps(extract(str(pages), ExtractConfig(base_url="http://h.org/"), str(tmp_path / "two")), ProcessPool(2))
    assert contents(tmp_path / "out") == contents(tmp_path / "two")


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


def test_no_pages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pages must be a folder of HTML, WARC or WAT files"):
        run_steps(extract(str(tmp_path), ExtractConfig(), str(tmp_path / "out")), Inline())
