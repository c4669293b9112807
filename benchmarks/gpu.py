"""Shared by benchmarks on a GPU: calls as CUDA graphs, times by events, and the least time that an H200 needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

BYTES_PER_SECOND = 4.3e12
"""Bandwidth of an H200's memory, read and written, as large copies reach it."""
OPERATIONS_PER_SECOND = 790e12
"""Rate of its matrix units in bfloat16, as large products reach it."""

CALLS = 20  # in a round: the time to record an event would hide a single call of 30 us
SHORTEST_ROUND = 2e-3  # seconds; a longer call is timed alone


def floor_seconds(least_bytes: float, operations: float = 0) -> float:
    """The least time in which an H200 moves these bytes and does these operations in bfloat16."""
    return max(least_bytes / BYTES_PER_SECOND, operations / OPERATIONS_PER_SECOND)


def slow_to_build(peers: Iterable[str]) -> list[Any]:
    """Peers as parameters of a test; compiled peers come last."""
    return [pytest.param(peer, marks=pytest.mark.slow_to_build if "compiled" in peer else ()) for peer in peers]


def as_graph(function: Callable[[], object]) -> Callable[[], None]:
    """Replay the launches of a call as a CUDA graph, without the work of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def seconds(function: Callable[[], object]) -> float:
    """The device's time for one call: the mean of several in a row, between two events."""
    one = _between_events(function, 1)
    calls = max(1, min(CALLS, round(SHORTEST_ROUND / max(one, 1e-9))))
    return one if calls == 1 else _between_events(function, calls)


def _between_events(function: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


class Clock:
    """A clock of the device's time: pytest-benchmark reads it before and after each timed call."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def time(self, function: Callable[[], object]) -> float:
        """Run a function, and advance the clock by its :func:`seconds`."""
        taken = seconds(function)
        self.now += taken
        return taken
