"""How fast a run is, and where its time and memory go, interval by interval of its metrics."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from dinov2.train.config import RunConfig
from dinov2.train.flops import peak_flops, step_flops
from dinov2.train.processes import Processes

Item = TypeVar("Item")
GB = 1e9


class IntervalClock:
    """Measures the steps since it was last restarted.

    Args:
        config: the run.
        teacher: its teacher.
        processes: those that take part.
    """

    def __init__(self, config: RunConfig, teacher: nn.ModuleDict, processes: Processes) -> None:
        self._device = processes.device
        self._batch_size = config.batch_size
        self._flops = step_flops(config, teacher) / processes.world_size  # of each process
        self._peak = peak_flops(config, processes.device)
        self.restart()

    def restart(self) -> None:
        """Start an interval."""
        self._start, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step(self) -> None:
        """One more step is done."""
        self._steps += 1

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """``items``, and how long they made the loop wait."""
        while True:
            start = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            yield item

    def values(self) -> dict[str, float]:
        """Metrics of the interval, to be asked for when its steps are really over.

        - images_per_second: of all processes;
        - data_wait: share of the time in which this process waited for images; a GPU may still have had work then;
        - tflops: 10^12 operations a second of each process, see :mod:`dinov2.train.flops`;
        - mfu: these as a share of what the device does at best, where that is known;
        - memory_gb: most that this process has held so far, in 10^9 bytes: tensors on its GPU, or all of it on a CPU.
        """
        seconds = time.monotonic() - self._start
        flops = self._steps * self._flops / seconds
        values = {
            "images_per_second": self._steps * self._batch_size / seconds,
            "data_wait": self._waited / seconds,
            "tflops": flops / 1e12,
            "memory_gb": peak_memory(self._device) / GB,
        }
        return values if self._peak is None else values | {"mfu": flops / self._peak}


def peak_memory(device: torch.device) -> int:
    """Bytes of tensors that were on an accelerator at once, at most; on the CPU bytes of the process."""
    if device.type == "cpu":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most  # bytes there, KiB on Linux
    return torch.accelerator.max_memory_allocated(device)
