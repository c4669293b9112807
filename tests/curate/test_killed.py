"""A curation that is killed, again and again, at random places: its rerun ends with the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from dinov2.curate import CurateConfig, FailedShardsError, curate, only, run_steps
from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.dedup import DedupConfig
from dinov2.curate.download import DownloadConfig
from dinov2.curate.engines import EngineConfig, Inline
from dinov2.curate.extract import ExtractConfig
from dinov2.curate.materialize import MaterializeConfig
from dinov2.curate.retrieve import RetrieveConfig
from dinov2.curate.screen import ScreenConfig
from dinov2.curate.search import SearchConfig
from dinov2.curate.steps import ABOUT, COUNTS
from dinov2.demo.planted import planted_images
from dinov2.recipes import laptop
from tests.curate.test_runner import contents
from tests.forkserver import CONTEXT

KILLS = 20
ORDER = ("extract", "download", "collect", "screen", "embed", "dedup", "embed", "retrieve", "materialize")
"""Runs of stages, each of which takes its stage as far as it goes: embed runs again for what dedup has left."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # where connections find no place in the queue, they try again a second later


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CurateConfig]:
    """Every stage, from pages on a server of this machine."""
    root = tmp_path_factory.mktemp("crawl")
    for folder in ("web/pages", "evaluation", "seeds"):
        (root / folder).mkdir(parents=True)
    for number, image in enumerate(planted_images(0, per_photograph=6, distractors=4)):
        folder = {"pool": "web", "evaluation": "evaluation", "seed": "seeds"}[image.role]
        (root / folder / f"{image.name}.jpg").write_bytes(image.content)
        if number % 9 == 0:
            (root / "seeds" / f"{image.name}.jpg").write_bytes(image.content)
    names = sorted(path.name for path in (root / "web").glob("*.jpg"))
    for number in range(4):
        links = "".join(f'<img src="../{name}">' for name in names[number::4])
        (root / "web" / "pages" / f"{number}.html").write_text(links)
    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(root / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    search = SearchConfig(index="ivf_sq8", lists=4, probes=4, query_rows=40, index_rows=60)
    yield dataclasses.replace(
        laptop(),
        pages=str(root / "web" / "pages"),
        evaluation_sets=(str(root / "evaluation"),),
        seeds=(str(root / "seeds"),),
        extract=ExtractConfig(base_url=f"{address}/pages", files_per_shard=2),
        download=DownloadConfig(links_per_shard=30, delay=0, per_host=8, allow_private_addresses=True),
        screen=ScreenConfig(faces="none", nsfw="none", max_distance=0),
        dedup=DedupConfig(threshold=0.8, guard_threshold=0.8, reference_threshold=0.9, search=search),
        retrieve=RetrieveConfig(min_seeds=1, clusters=ClusterConfig(clusters=4, passes=2)),
        materialize=MaterializeConfig(shard_size=10),
        engine=EngineConfig("inline"),
    )
    server.shutdown()


def work(config: CurateConfig, stage: str, begun: Connection) -> None:
    """What is killed: one stage, once it says that it begins."""
    steps = only(curate(config), stage)
    begun.send(None)
    run_steps(steps, Inline())


def kill(config: CurateConfig, stage: str, seconds: float) -> bool:
    """Run a stage in a process that is killed so long after its beginning; False where it ended before."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(config, stage, there))
    process.start()
    here.recv()
    process.join(seconds)
    killed = process.exitcode is None
    process.kill()
    process.join()
    return killed


def finished(output: Path) -> dict[str, int]:
    """Shards that are done, and when they were written: every file of theirs."""
    done = {path.with_suffix("") for path in output.rglob(f"*{COUNTS}") if path.parent.name != ABOUT}
    files = [path for path in output.rglob("*") if path.is_file() and path.with_suffix("") in done]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_killed_twenty_times(config: CurateConfig, tmp_path: Path) -> None:
    calm = dataclasses.replace(config, output=str(tmp_path / "calm"))
    killed = dataclasses.replace(config, output=str(tmp_path / "killed"))
    output, rng, seen = tmp_path / "killed", np.random.default_rng(0), dict[str, int]()
    for number, stage in enumerate(ORDER):
        started = time.monotonic()
        run_steps(only(curate(calm), stage), Inline())
        duration = time.monotonic() - started
        before = set(output.glob("*"))
        for _ in range(KILLS // len(ORDER) + (number < KILLS % len(ORDER))):
            while not kill(killed, stage, duration * float(rng.uniform(0, 0.8))):
                for path in set(output.glob("*")) - before:  # it was faster: away with what it made, and again
                    shutil.rmtree(path)
                seen = {path: at for path, at in seen.items() if Path(path).exists()}
            seen = not_again(seen, output)
        run_steps(only(curate(killed), stage), Inline())
        seen = not_again(seen, output)
    run_steps(curate(killed), Inline())
    not_again(seen, output)
    assert contents(output) == contents(tmp_path / "calm")


def not_again(before: dict[str, int], output: Path) -> dict[str, int]:
    """What is done now; fails where anything that was done before was done again."""
    now = finished(output)
    assert {path: now.get(path) for path in before} == before
    return now


def test_a_full_disk(config: CurateConfig, tmp_path: Path) -> None:
    """A limit of the size of files stands in for it: what does not fit is reported, and nothing is half-written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(FailedShardsError, match=r"of download-images failed 2 times.*\n.*File too large"):
            run_steps(curate(dataclasses.replace(config, output=str(tmp_path))), Inline(), tries=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.partial"))
    run_steps(only(curate(dataclasses.replace(config, output=str(tmp_path))), "download"), Inline())
