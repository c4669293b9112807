"""Links become shards: ordered, named, counted, the same on every run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2.curate import Pool, run_steps
from dinov2.curate.download import DownloadConfig, download
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.pool import read_table
from dinov2.data import TarShards
from tests.curate.misbehaving import Server, serving
from tests.curate.test_runner import contents

CONFIG = DownloadConfig(delay=0, tries=1, links_per_shard=6, robots=False, allow_private_addresses=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def write_links(folder: Path, urls: list[str]) -> str:
    folder.mkdir()
    pq.write_table(pa.table({"url": pa.array(urls, pa.string()), "page": ["p"] * len(urls)}), folder / "a.parquet")
    return str(folder)


def test_links_become_shards(tmp_path: Path, server: Server) -> None:
    names = [f"{server.address}/fine?{number}" for number in range(8)]
    odd = [names[0], f"{server.address}/gone", "data:image/png;base64,xx", "ftp://x/y", "http://[::1", "http:///x"]
    hostile = [f"{server.address}/../../../../etc/%2e%2e/passwd", f"{server.address}/caf\u00e9?\u4e2d\u6587"]
    links = write_links(tmp_path / "links", [*names, *odd, *hostile])
    pool: Pool = run_steps(download(links, CONFIG, str(tmp_path / "out")), ProcessPool(2))
    shards = TarShards(pool.images)
    assert len(shards) == 10
    assert [shard.rpartition("/")[2] for shard in shards.paths] == ["00000.tar", "00001.tar"]
    tables = [read_table(pool.images, shard) for shard in pool.shards()]
    assert [reason for table in tables for reason in table["reason"].to_pylist() if reason] == ["HTTP 404"]
    urls = [url for shard in pool.shards() for url in pool.index(shard, ["url"])["url"].to_pylist()]
    assert set(names) <= set(urls)
    assert len(set(urls)) == 10
    plan = json.loads(next((tmp_path / "out").glob("download-plan-*/all.json")).read_text())
    assert plan["dropped"] == {"data: URL": 1, "malformed URL": 2, "other scheme": 1, "repeated link": 1}
    assert not list(tmp_path.rglob("passwd*"))

    again: Pool = run_steps(download(links, CONFIG, str(tmp_path / "again")), Inline())
    assert contents(Path(again.images)) == contents(Path(pool.images))


def test_no_links(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="links: expected a folder of Parquet tables"):
        run_steps(download(str(tmp_path), CONFIG, str(tmp_path / "out")), Inline())
