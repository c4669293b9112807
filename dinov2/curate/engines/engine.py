"""What an engine does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from dinov2.curate.steps import Task, run_task


class Call(NamedTuple):
    """A task, and the folder of its step."""

    folder: str
    task: Task
    gpu: bool = False


class Outcome(NamedTuple):
    """What became of a call: nothing to say, or why there is no shard."""

    call: Call
    error: Exception | None


class LostTaskError(RuntimeError):
    """The process that made a shard is gone: killed, by the system where memory is short, or with its machine."""


class Engine(Protocol):
    """Runs calls, each once, and says of each what became of it, in the order in which they end."""

    def run(self, calls: Sequence[Call], at_once: int | None = None) -> Iterator[Outcome]:
        """``at_once`` limits how many run side by side, below what the engine has room for."""
        ...


def execute(call: Call) -> None:
    """Run a call on one thread, so that neither speed nor rounding depends on who else runs."""
    with single_thread():
        run_task(call.folder, call.task)


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for PyTorch, and for Faiss where it is in use."""
    faiss = sys.modules.get("faiss")
    threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads() if faiss else None
    torch.set_num_threads(1)
    if faiss:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if faiss:
            faiss.omp_set_num_threads(faiss_threads)
