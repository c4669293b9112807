"""A trace of some steps: every operator on the host and the GPU, with its time, for Perfetto or chrome://tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dinov2.train.config import STEPS_BEFORE_PROFILE, RunConfig


class StepProfiler(AbstractContextManager["StepProfiler"]):
    """Traces ``config.profile_steps`` steps, after those in which allocators and caches settle.

    Attributes:
        trace: where the trace is written.
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
        """One more step is done; returns whether the trace was written with it."""
        before = self.is_written
        if self._profile is not None:
            self._profile.step()
        return self.is_written and not before

    def _write(self, finished: Any) -> None:
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        partial = self.trace.with_name("partial.json.gz")
        finished.export_chrome_trace(str(partial))
        partial.replace(self.trace)
        self.is_written = True
