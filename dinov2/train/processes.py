"""The processes of a run: a single process, or the processes that torchrun started, which train as one.

Nothing here waits for the accelerator. Gradients and statistics of a batch are exchanged elsewhere. All other messages
between processes (a request to stop, an error in process 0) go from host to host through gloo.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GLOO_WORDS = ("gloo", "pair closure")  # gloo's errors about other processes contain one of these


class PeerError(ConnectionError):
    """Another process of the run failed, ended or did not answer."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, from the view of one of them.

    Attributes:
        device: device of this process.
        rank: number of this process.
        world_size: number of processes.
        group: group of all processes; None for a single process, which does not use torch.distributed.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def describe(self) -> str:
        """The devices of the run, in words."""
        return f"{self.device}" if self.world_size == 1 else f"{self.world_size} processes on {self.device.type}"

    def share(self, images: int) -> int:
        """Number of images of each process in a micro-batch of ``images``.

        Raises:
            ValueError: the images do not split evenly.
        """
        if images % self.world_size:
            raise ValueError(
                "batch_size / accumulation_steps: expected a multiple of the number of processes,"
                f" {self.world_size}, got {images}"
            )
        return images // self.world_size

    def mean(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean of each scalar over the processes, float32 on the device, by one all-reduce."""
        if self.group is None:
            return dict(scalars)
        values = torch.stack([value.detach().float() for value in scalars.values()])
        dist.all_reduce(values, group=self.group)
        return dict(zip(scalars, values / self.world_size, strict=True))

    def first(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` in process 0 only, and return its result in all processes; the others wait for it.

        Raises:
            PeerError: the action failed. Process 0 raises the error itself, and the others raise this.
        """
        if self.group is None:
            return action()
        outcome: list[tuple[Result | None, str | None]] = [(None, None)]
        error: BaseException | None = None
        if self.is_first:
            try:
                outcome = [(action(), None)]
            except Exception as caught:
                error, outcome = caught, [(None, str(caught))]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if error is not None:
            raise error
        result, failure = outcome[0]
        if failure is not None:
            raise PeerError(f"process 0 failed: {failure}")
        return result  # type: ignore[return-value]

    def together(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` in every process and return its result here; no process goes on unless all succeed.

        Raises:
            PeerError: the action failed in another process, which raises the error itself.
        """
        if self.group is None:
            return action()
        result: Result | None = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        failures: list[str | None] = [None] * self.world_size
        dist.all_gather_object(failures, None if error is None else str(error), group=self.group)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise PeerError(f"process {rank} failed: {failure}")
        return result  # type: ignore[return-value]

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes in process 0; an empty list in the others."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size if self.is_first else []
        dist.gather_object(value, values if self.is_first else None, dst=0, group=self.group)
        return values


class StepAgreement:
    """Numbers on which all processes agree after a step, so that all act on them after the same step.

    A single process has its numbers at once. Several processes exchange them during the next step, so nobody waits: at
    the end of a step, each gets the numbers that all had at the end of the step before.

    Args:
        processes: the processes of the run.
        first: the answer before the first exchange.
    """

    def __init__(self, processes: Processes, first: tuple[int, ...]) -> None:
        self._group = processes.group
        self._first = first
        self._pending: tuple[Tensor, dist.Work] | None = None

    def after_step(self, *numbers: int) -> tuple[int, ...]:
        """The minimum of each number over the processes. Every process calls it after every step."""
        if self._group is None:
            return numbers
        before, self._pending = self._pending, self._send(numbers)
        if before is None:
            return self._first
        least, work = before
        work.wait()
        return tuple(least.tolist())

    def _send(self, numbers: tuple[int, ...]) -> tuple[Tensor, dist.Work]:
        least = torch.tensor(numbers)  # on the host, because gloo exchanges it
        work = dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group, async_op=True)
        assert work is not None
        return least, work


@contextmanager
def join_processes(device: str, timeout_seconds: float) -> Iterator[Processes]:
    """The processes of this run: torchrun's, those of an existing process group, or this process alone.

    Args:
        device: ``device`` of the configuration; with several processes on GPUs, LOCAL_RANK chooses the GPU.
        timeout_seconds: the run fails if a process waits longer for the others.

    Raises:
        PeerError: another process failed, ended or did not answer in this time.
    """
    owned = dist.is_torchelastic_launched() and not dist.is_initialized()
    if not owned and not dist.is_initialized():
        yield Processes(resolve_device(device))
        return
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        chosen = _own_gpu()
        torch.cuda.set_device(chosen)
    if owned:
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            number_in(name)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        except (ValueError, RuntimeError) as error:
            given = ", ".join(f"{name}={os.environ.get(name)}" for name in RENDEZVOUS)
            reason = str(error).splitlines()[0]
            raise PeerError(
                f"expected variables by which processes meet, as torchrun sets them, got {given}: {reason}"
            ) from error
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        yield Processes(chosen, rank, world_size, dist.group.WORLD)
        dist.barrier()  # wait for all exchanges: Python aborts if it ends while gloo's threads hold one
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise PeerError(
            f"process {rank} of {world_size} lost another one, which failed, was stopped, or did not answer within"
            f" parallel.timeout_seconds; the output of that process says why ({reason})"
        ) from error
    finally:
        if owned:
            dist.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether torch.distributed raised an error because of a lost process; gloo has no error type for this."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in GLOO_WORDS)


def resolve_device(name: str, *, here: bool = True) -> torch.device:
    """The device that the configuration's ``device`` names; ``"auto"`` takes an accelerator if there is one.

    Args:
        name: as in the configuration, such as ``cpu`` and ``cuda:1``.
        here: whether this machine must have the device; a plan for another machine needs only a name.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # no such word
        device = None
    if device is not None and (not here or (device.index or 0) < _count(device.type)):
        return device
    if not here:
        raise ValueError(f"device: expected auto, cpu, cuda or another name of PyTorch's, got {name!r}")
    found = {kind: _count(kind) for kind in ("cuda", "xpu", "mps", "mtia")}
    names = ["auto", "cpu", *(f"{kind}, {kind}:N with N below {count}" for kind, count in found.items() if count)]
    lacks = device is not None and device.type == "cuda" and not torch.version.cuda
    reason = f"; PyTorch {torch.__version__} was built without CUDA" if lacks else ""
    raise ValueError(
        f"device: expected {' or '.join(names)}, the devices that PyTorch finds here, got {name!r}{reason}"
    )


def _count(kind: str) -> int:
    """The number of devices of a kind, such as cuda, that PyTorch finds here."""
    if kind == "cpu":
        return 1
    module: Any = getattr(torch, kind, None)  # such as torch.cuda
    return int(module.device_count()) if hasattr(module, "is_available") and module.is_available() else 0


def number_in(name: str, default: int | None = None) -> int:
    """The number that an environment variable of torchrun holds.

    Raises:
        ValueError: it holds none, or it is not set and has no default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(f"{name}: expected a whole number, as torchrun sets it, got {text!r}")
    return int(text)


def _own_gpu() -> torch.device:
    """The GPU of this process: torchrun numbers the processes of a machine."""
    number = os.environ.get("LOCAL_RANK", "")
    try:
        return resolve_device(f"cuda:{number}")
    except ValueError:
        there = _count("cuda")
        expected = f"one process for each of the {there} GPUs here, numbered from 0 (torchrun --nproc-per-node {there})"
        raise ValueError(f"LOCAL_RANK: expected {expected}, got {number!r}") from None


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved a checkpoint; the message says how to continue."""


class StopSignals:
    """Context in which SIGINT and SIGTERM only set ``received``; a second signal interrupts at once.

    Only the main thread receives signals: in any other thread this context changes nothing.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        os.write(2, b"\nstopping after this step and a checkpoint; a second signal stops at once\n")  # signal-safe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
