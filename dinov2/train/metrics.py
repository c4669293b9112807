"""Metrics of a run: scalars on the device, speed, memory and traces; written as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, schedule

from dinov2.configuration import replacing
from dinov2.extras import require
from dinov2.train.config import STEPS_BEFORE_PROFILE, RunConfig
from dinov2.train.flops import peak_flops, step_flops
from dinov2.train.processes import Processes

SKIPPED = "skipped"
"""A scalar of float16 steps: 1 if gradients overflowed and the step was skipped, else 0. Its mean is their share."""
GRADIENTS = "grad_norm/"
"""Prefix of the names of gradient norms. A skipped step does not count in their means."""
Item = TypeVar("Item")
GB = 1e9


class NonFiniteError(ArithmeticError):
    """A loss or gradient norm became NaN or infinite."""


class StepScalars:
    """Scalars of the steps since the last line of metrics. They stay on the device, so no step waits for them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.rows: list[Tensor] = []  # one [len(names)] per step

    def append(self, scalars: Mapping[str, Tensor]) -> None:
        """Store the scalars of one more step."""
        self.names = list(scalars)
        self.rows.append(torch.stack([value.detach().float() for value in scalars.values()]))

    def check_finite(self, finished_steps: int, last_checkpoint: Callable[[], Path | None]) -> None:
        """Search the stored steps for the first NaN or infinity.

        Gradients of skipped steps may be infinite, because the loss scale then shrinks by itself.

        Args:
            finished_steps: number of the last stored step, counted from 1.
            last_checkpoint: returns the newest checkpoint; called only if there is a NaN or infinity.

        Raises:
            NonFiniteError: a loss term or gradient norm is NaN or infinite; the message names it, the step and the last
                good checkpoint.
        """
        first_step = finished_steps - len(self.rows) + 1
        for step, row in enumerate(self._values().tolist(), start=first_step):
            bad = {
                name: value
                for name, value in zip(self.names, row, strict=True)
                if not math.isfinite(value) and not (name.startswith(GRADIENTS) and self._is_skipped(row))
            }
            if bad:
                culprits = bad.keys() - {"total"} or bad.keys()  # the total is not named if its terms are
                terms = ", ".join(f"{name} is {value}" for name, value in bad.items() if name in culprits)
                raise NonFiniteError(f"training stopped: in step {step} {terms}; {way_back(last_checkpoint())}")

    def means(self) -> dict[str, float]:
        """Mean of each scalar over the stored steps; means of gradient norms leave out skipped steps."""
        rows = self._values().tolist()
        counted = [row for row in rows if not self._is_skipped(row)]
        columns = {
            name: [row[index] for row in (counted if name.startswith(GRADIENTS) else rows)]
            for index, name in enumerate(self.names)
        }
        return {name: math.fsum(column) / len(column) for name, column in columns.items() if column}

    def clear(self) -> None:
        """Start a new interval."""
        self.rows = []

    def state_dict(self) -> dict[str, Any]:
        """The stored scalars, for a checkpoint in the middle of an interval; JSON keeps float32 values exactly."""
        return {"names": self.names, "values": self._values().tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the interval of a checkpoint."""
        self.names = list(state["names"])
        self.rows = [torch.tensor(row) for row in state["values"]]

    def _is_skipped(self, row: Sequence[float]) -> bool:
        return SKIPPED in self.names and bool(row[self.names.index(SKIPPED)])

    def _values(self) -> Tensor:
        if not self.rows:
            return torch.empty(0, len(self.names))
        device = self.rows[-1].device  # rows of a checkpoint are on the host
        return torch.stack([row.to(device) for row in self.rows]).cpu()


def check_loss_scale(scale: float, last_checkpoint: Callable[[], Path | None]) -> None:
    """Raise NonFiniteError if the loss scale is below 1: then gradients overflow even without scaling."""
    if scale < 1:
        raise NonFiniteError(
            f"training stopped: gradients overflow float16 even at a loss scale of {scale}; use precision bf16 or fp32;"
            f" {way_back(last_checkpoint())}"
        )


def way_back(last_checkpoint: Path | None) -> str:
    """The checkpoint from which a failed run can continue, as part of an error message."""
    return f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was written yet"


class MetricsWriter:
    """Appends lines to ``metrics.jsonl`` and scalars to ``tensorboard/`` of a run directory. It flushes each line.

    A run that resumes at ``start_step`` first removes everything after that step, so no step is there twice.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        require("tensorboard", extra="train", purpose="writing TensorBoard metrics")
        from torch.utils.tensorboard import SummaryWriter

        path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= start_step] if start_step else []
        with replacing(path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(directory / "tensorboard", purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the ``values`` after ``step`` finished steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's buffer. Errors are ignored, because :meth:`write` has reported a full disk already."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without an unfinished last line of a killed process."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class IntervalClock:
    """Measures the steps since it was last restarted.

    Args:
        config: the run.
        teacher: the run's EMA teacher.
        processes: the processes of the run.
    """

    def __init__(self, config: RunConfig, teacher: nn.ModuleDict, processes: Processes) -> None:
        self._device = processes.device
        self._batch_size = config.batch_size
        self._flops = step_flops(config, teacher) / processes.world_size  # of each process
        self._peak = peak_flops(config, processes.device)
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        self._start, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step(self) -> None:
        """Count one more step."""
        self._steps += 1

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield ``items`` and measure how long the loop waits for them."""
        while True:
            start = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            yield item

    def values(self) -> dict[str, float]:
        """Metrics of the interval. Call it only when the device has finished the interval's steps.

        - images_per_second: images of all processes per second;
        - data_wait: share of the time in which this process waited for images; a GPU may have had work meanwhile;
        - tflops: 10^12 operations per second of each process, see :mod:`dinov2.train.flops`;
        - mfu: tflops as a share of the device's peak, if the peak is known;
        - memory_gb: peak memory of this process in 10^9 bytes: its tensors on a GPU, or the whole process on a CPU.
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
    """Peak memory in bytes: tensors on an accelerator, or the whole process on the CPU."""
    if device.type == "cpu":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most  # bytes on macOS, KiB on Linux
    return torch.accelerator.max_memory_allocated(device)


class StepProfiler(AbstractContextManager["StepProfiler"]):
    """Traces ``config.profile_steps`` steps, after the first steps, in which allocators and caches fill.

    Attributes:
        trace: path of the trace.
    """

    def __init__(self, config: RunConfig, start_step: int) -> None:
        first = start_step + STEPS_BEFORE_PROFILE + 1
        self.steps = config.profile_steps
        self.trace = config.output / "profile" / f"steps_{first}_to_{first + self.steps - 1}.json.gz"
        self.is_written = False
        self._profile: Any = None
        if self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=STEPS_BEFORE_PROFILE - 1, warmup=1, active=self.steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )

    def __enter__(self) -> StepProfiler:
        (self._profile or nullcontext()).__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        (self._profile or nullcontext()).__exit__(*error)

    def step(self) -> bool:
        """Count one more step; returns whether the trace has just been written."""
        before = self.is_written
        if self._profile is not None:
            self._profile.step()
        return self.is_written and not before

    def _write(self, finished: Any) -> None:
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.trace) as file:
            finished.export_chrome_trace(str(file))
        self.is_written = True
