"""Shared by all benchmarks: peers are timed in turns, and every run writes a dated JSON to ``benchmarks/results``.

``make bench`` runs all files here; ``pytest benchmarks/sinkhorn.py`` runs one. Peers have the same group, and
pytest-benchmark's table shows them side by side. The name of a result file has the date and the machine, unless
``--results`` names it. A later run on the same day replaces the entries that it measures again. The file is written
after every benchmark, so a run that is cut short keeps its measurements.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

# OpenMP reads this when PyTorch is loaded. On a busy machine, threads that wait by spinning use up their share of the
# processor. Each short kernel of a peer would then wait a scheduler's tick for its second thread, and the benchmark
# would measure nothing but this wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import gpu

RESULTS = Path(__file__).parent / "results"
Measurements = dict[str, dict[str, object]]
Compare = Callable[..., None]
CLOCK = gpu.Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--million", action="store_true", help="also measures curation on a million vectors")
    parser.addoption("--peer-python", help="names the Python of an environment for peers that need their own")
    parser.addoption("--rounds", type=int, help="sets the rounds of every benchmark")
    parser.addoption("--results", type=Path, help="names the result file in place of benchmarks/results/DATE-MACHINE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-benchmark read the device's time on a GPU, and run peers last that take long to build."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    items.sort(key=lambda item: item.get_closest_marker("slow_to_build") is not None)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect every file here but this one: pytest alone collects test_*.py and files that its command line names."""
    is_suite = file_path.suffix == ".py" and file_path.name != "conftest.py"
    if not is_suite or parent.session.isinitpath(file_path):
        return None
    return pytest.Module.from_parent(parent, path=file_path)  # type: ignore[no-any-return]


def seconds(function: Callable[[], object]) -> float:
    """The time of one call, by the host's clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def compare(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Compare:
    """Time a peer in turns with the baseline, so that a busy machine slows both; record bytes and the ratio.

    ``compare(peer, baseline, least_bytes=..., rounds=...)`` adds to the result:

    - ``speedup``: the median over the rounds of baseline time / own time;
    - ``baseline_ms``: the median time of the baseline;
    - ``least_MB``: the bytes that any implementation must move, and ``GB_per_s``: these over the median time;
    - ``GFLOP_per_s``, with ``flops=...``: the operations that any implementation must do, over the median time;
    - ``floor_ms``, on a GPU: the least time of an H200, by bytes and operations, or ``floor=...`` in seconds;
    - ``predicted_ms``, with ``predicted=...`` in seconds.
    """

    on_gpu = request.node.get_closest_marker("gpu") is not None
    time_of_baseline, time_of_peer = (gpu.seconds, CLOCK.time) if on_gpu else (seconds, seconds)

    def run(
        peer: Callable[[], object],
        baseline: Callable[[], object],
        *,
        least_bytes: int,
        rounds: int,
        flops: int = 0,
        floor: float | None = None,
        predicted: float | None = None,
    ) -> None:
        peer()  # warm up: threads, caches, torch.compile
        baseline()
        pairs: list[tuple[float, float]] = []
        times: list[float] = []

        def before_round() -> None:
            times.append(time_of_baseline(baseline))

        def timed() -> None:
            pairs.append((times[-1], time_of_peer(peer)))

        rounds = request.config.getoption("rounds") or rounds
        benchmark.pedantic(timed, setup=before_round, rounds=rounds)
        median = statistics.median(own for _, own in pairs)
        benchmark.extra_info |= {
            "speedup": round(statistics.median(base / own for base, own in pairs), 2),
            "baseline_ms": round(1e3 * statistics.median(times), 4),
            "least_MB": round(least_bytes / 1e6, 1),
            "GB_per_s": round(least_bytes / median / 1e9, 2),
        }
        if flops:
            benchmark.extra_info["GFLOP_per_s"] = round(flops / median / 1e9, 1)
        if on_gpu:
            floor = gpu.floor_seconds(least_bytes, flops) if floor is None else floor
            benchmark.extra_info["floor_ms"] = round(1e3 * floor, 4)
        if predicted is not None:
            benchmark.extra_info["predicted_ms"] = round(1e3 * predicted, 4)

    return run


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> dict[str, object]:
    """The measured machine: its GPU if the benchmarks need one."""
    on_gpu = any(item.get_closest_marker("gpu") for item in request.session.items)
    return describe_machine("cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def record(request: pytest.FixtureRequest, machine: dict[str, object]) -> Iterator[None]:
    """Write the numbers of a test into the result file."""
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is None or not benchmark.stats:
        return
    stats = benchmark.stats.stats
    times = {name: round(1e3 * getattr(stats, name), 4) for name in ("min", "median", "max")}
    measured = {"group": benchmark.group, "milliseconds": times, "rounds": stats.rounds, **benchmark.extra_info}
    write_results({request.node.nodeid: measured}, machine, request.config.getoption("results"))


def write_results(measurements: Measurements, machine: dict[str, object], path: Path | None) -> None:
    """Add measurements to a result file; without ``path``, its name has the date and the machine."""
    if path is None:
        name = re.sub("[^a-z0-9]+", "-", f"{machine['processor']} {machine['threads']} threads".lower())
        path = RESULTS / f"{date.today()}-{name}.json"
    earlier: Measurements = json.loads(path.read_text())["results"] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": earlier | measurements}, indent=1) + "\n")


def describe_machine(device: str) -> dict[str, object]:
    """The measured processor, and the memory bandwidth that large copies and sums reach on it."""
    time_of = gpu.seconds if device == "cuda" else seconds
    source = torch.ones(2**26, device=device)  # 256 MB
    target = torch.ones_like(source)
    read = min(time_of(source.sum) for _ in range(10))
    copy = min(time_of(lambda: target.copy_(source)) for _ in range(10))
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "openmp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_GB_per_s": round(source.nbytes / read / 1e9, 1),
        "copy_GB_per_s": round(2 * source.nbytes / copy / 1e9, 1),
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search("model name\\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.machine()
