"""What is logged of speed and memory, and the trace of a few steps."""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinov2.train import ParallelConfig, PretrainConfig, pretrain, read_metrics
from dinov2.train.flops import step_flops
from dinov2.train.metrics import IntervalClock, peak_memory
from dinov2.train.processes import Processes
from dinov2.train.sharding import mesh_of
from dinov2.train.trainer import build_objective


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_an_interval(config: PretrainConfig, seconds: list[float]) -> None:
    """Two steps of 4 images in 8 seconds, 2 of which the loop waited for images."""

    def slow() -> Iterator[int]:
        for number in range(2):
            seconds[0] += 1
            yield number

    config = dataclasses.replace(config, peak_tflops=1e-6)
    teacher = build_objective(config, None).teacher
    clock = IntervalClock(config, teacher, Processes(torch.device("cpu"), rank=1, world_size=2))
    seconds[0] += 50
    clock.restart()
    for _ in clock.waiting(slow()):
        seconds[0] += 3
        clock.step()
    values = clock.values()
    flops = 2 * step_flops(config, teacher) / 8 / 2  # of each of two processes
    assert values.pop("memory_gb") > 0
    assert values == {
        "images_per_second": 1.0,
        "data_wait": 0.25,
        "tflops": pytest.approx(flops / 1e12),
        "mfu": pytest.approx(flops / 1e6),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_in_bytes() -> None:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    held = 1024 * int(status["VmHWM"].split()[0])
    assert held / 2 < peak_memory(torch.device("cpu")) < 100 * held  # that of the parent counts where it was larger


def test_a_run_logs_its_speed(config: PretrainConfig) -> None:
    for line in read_metrics(pretrain(dataclasses.replace(config, steps=2)) / "metrics.jsonl"):
        assert line["images_per_second"] > 0
        assert line["tflops"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["memory_gb"] > 0.05
        assert "mfu" not in line, "nobody knows the peak of this CPU"


def test_profile(config: PretrainConfig, capsys: pytest.CaptureFixture) -> None:
    pretrain(dataclasses.replace(config, profile_steps=2))
    trace = config.output / "profile" / "steps_6_to_7.json.gz"
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]
    assert f"profile: {trace}" in capsys.readouterr().out
    events = [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert events.count("Optimizer.step#AdamW.step") == 2
    assert "dinov2_kernels::attention_forward" in events


def test_a_profile_longer_than_the_run_is_refused(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="profile_steps: expected 3 at most, those after the first five, got 4"):
        dataclasses.replace(config, profile_steps=4)


def test_processes_that_do_not_divide_into_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(torch.device("cpu"), world_size=8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for parallel in (ParallelConfig(sharding="hybrid", shard_size=3), ParallelConfig(sharding="hybrid")):
        with pytest.raises(ValueError, match="expected a divisor of the number of processes, 8, got replicas of 3"):
            mesh_of(parallel, processes)
    with pytest.raises(ValueError, match=r"parallel\.shard_size: expected None with sharding full, got 2"):
        ParallelConfig(sharding="full", shard_size=2)
