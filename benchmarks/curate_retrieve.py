"""Retrieval for 10,000 seeds, by neighbours and by clusters, beside Faiss, in time, memory and quality.

Each method runs in a separate process, measured as in ``curate_dedup.py``. The vectors are the same (384 dimensions,
1,000 topics), and seeds are vectors of the same kind. ``pytest benchmarks/curate_retrieve.py`` measures 10,000 and
100,000 vectors, and with ``--million`` also a million.

Prediction for two cores:

- By neighbours: 10,000 x N pairs at 1 to 9 ns, so 10 to 90 s of a processor for a million. Below 100,000, the start of
  processes takes most of the time.
- By clusters, a million vectors: 20 iterations on 256,000 vectors of 1,000 clusters are 4 x 10^12 operations; five
  passes and the assignment over all vectors are 5 x 10^12. At 60 to 100 GFLOP/s a core this takes 2 to 3 minutes, and
  k-means++ half as much again. Faiss has no such passes and takes half of that.
- Memory: some portions of 65,536 rows, and the sample of 256,000 x 384 x 4 bytes = 0.4 GB, twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.curate_dedup import SIZES, Usage, watch
from benchmarks.dedup_methods import DIMENSIONS, plant
from benchmarks.retrieve_methods import METHODS

SEEDS = 10_000


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of vectors and seeds, for all methods."""
    if request.param == SIZES[-1] and not request.config.getoption("--million"):
        pytest.skip("a million vectors take ten minutes; --million measures them")
    folder, seeds = tmp_path_factory.mktemp("vectors"), tmp_path_factory.mktemp("seeds")
    plant(folder, request.param, topic=0.3)
    plant(seeds, SEEDS, topic=0.3, seed=1)  # the same topics, other images
    (seeds / "pool").rename(folder / "seeds")
    (seeds / "vectors.npy").rename(folder / "seeds.npy")
    return folder


@pytest.mark.timeout(0)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vectors", SIZES, indirect=True)
def test_retrieve(benchmark: BenchmarkFixture, vectors: Path, method: str) -> None:
    rows = len(np.load(vectors / "vectors.npy", mmap_mode="r"))
    benchmark.group = f"retrieve for {SEEDS} seeds from {rows} x {DIMENSIONS}"
    usages: list[Usage] = []
    results: list[str] = []

    def run() -> None:
        command = [sys.executable, str(Path(__file__).with_name("retrieve_methods.py")), method, str(vectors)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            done = threading.Event()
            watcher = threading.Thread(target=lambda: usages.append(watch(process.pid, done)))
            watcher.start()
            results.append(process.communicate()[0])
            done.set()
            watcher.join()
        assert process.returncode == 0

    benchmark.pedantic(run, rounds=1)
    seconds, quality = map(float, results[0].split())
    benchmark.extra_info |= {"seconds": round(seconds, 2), "processor_seconds": round(usages[0].seconds, 1)}
    benchmark.extra_info |= {"peak_MB": round(usages[0].peak / 1e6), "quality": round(quality, 4)}
