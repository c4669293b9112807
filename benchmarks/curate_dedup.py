"""Deduplication of planted copies, beside SemDeDup's rule, Faiss, imagededup and fastdup, in time, memory and quality.

Each method runs in a separate process. Memory is the peak of the sum over that process and its children.
``pytest benchmarks/curate_dedup.py`` measures 10,000 and 100,000 vectors, and with ``--million`` also a million.
``--peer-python PYTHON`` names an environment that has imagededup and fastdup.

Prediction for two cores with AMX, from the speed of single calls, in processor time:

- 10,000 vectors take a few seconds, the time to start processes eight times.
- 100,000 vectors by the flat index take 100,000^2 x 0.9 ns = 9 s and the same start. Brute force takes
  100,000^2 x 8.4 ns = 84 s.
- A million vectors by inverted files, with two portions of 2,048 lists and 32 lists searched, take
  2 x 0.35 ms x 10^6 = 700 s and less than 2 GB. All copies are found if there are topics. The flat index would take
  900 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.dedup_methods import DIMENSIONS, METHODS, plant, quality

SIZES = (10_000, 100_000, 1_000_000)
TOPICS = {"topics": 0.3, "isotropic": 0.0}

# The most vectors that a method gets: some hold all N x N cosines, and brute force would take hours.
LIMITS = {"faiss_brute_force": 100_000, "imagededup": 10_000, "fastdup": 100_000}

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of vectors, for all methods."""
    rows, kind = request.param
    if rows == SIZES[-1] and not request.config.getoption("--million"):
        pytest.skip("a million vectors take half an hour; --million measures them")
    folder = tmp_path_factory.mktemp("vectors")
    plant(folder, rows, TOPICS[kind])
    return folder


@pytest.mark.timeout(0)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "planted", [(rows, kind) for rows in SIZES for kind in TOPICS], indirect=True, ids=lambda of: f"{of[0]}-{of[1]}"
)
def test_dedup(benchmark: BenchmarkFixture, planted: Path, method: str, request: pytest.FixtureRequest) -> None:
    truth = np.load(planted / "truth.npy")
    if len(truth) > LIMITS.get(method, SIZES[-1]):
        pytest.skip(f"{method} is too slow or needs too much memory for {len(truth)} vectors")
    python = sys.executable
    if method in ("imagededup", "fastdup"):
        python = request.config.getoption("--peer-python") or pytest.skip(f"{method} needs --peer-python")
    benchmark.group = f"dedup {request.node.callspec.id.rpartition('-')[0]} x {DIMENSIONS}"
    usages: list[Usage] = []

    def run() -> float:
        command = [python, str(Path(__file__).with_name("dedup_methods.py")), method, str(planted)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            done = threading.Event()
            watcher = threading.Thread(target=lambda: usages.append(watch(process.pid, done)))
            watcher.start()
            output = process.communicate()[0]
            done.set()
            watcher.join()
        assert process.returncode == 0
        return float(output.split()[-1])

    seconds = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info |= {"seconds": round(seconds, 2), "processor_seconds": round(usages[0].seconds, 1)}
    benchmark.extra_info |= {"peak_MB": round(usages[0].peak / 1e6)}
    benchmark.extra_info |= quality(np.load(planted / f"{method}.npy"), truth)


class Usage(NamedTuple):
    """Memory and time of a process and its descendants.

    Attributes:
        peak: largest sum of resident bytes; memory that processes share counts for each of them.
        seconds: processor time, with imports and loading.
    """

    peak: int
    seconds: float


def watch(root: int, done: threading.Event) -> Usage:
    """Measure a process and its descendants ten times a second."""
    peak, ticks = 0, dict[int, int]()
    while not done.wait(0.1):
        parents, used = dict[int, int](), dict[int, int]()
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # the process has ended
                continue
            process = int(path.parent.name)
            parents[process], used[process] = int(fields[1]), int(fields[11]) + int(fields[12])
        tree, level = {root}, {root}
        while level := {process for process, parent in parents.items() if parent in level} - tree:
            tree |= level
        ticks |= {process: used[process] for process in tree & used.keys()}
        peak = max(peak, sum(_resident(process) for process in tree))
    return Usage(peak, sum(ticks.values()) / os.sysconf("SC_CLK_TCK"))


def _resident(process: int) -> int:
    """Resident bytes of a process; memory that processes share counts for each of them."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0
