"""Checkpoints written while training goes on.

A save begins after a step: each process copies its part of the state to the host, and a thread writes it from there.
Threads exchange nothing, so they can neither wait for another process nor come between the collectives of training.
What the processes must agree on goes the way of :class:`~dinov2.train.processes.StepAgreement`: after every step each
tells up to which step it has written everything. Once all have told the step of the save in flight, which they learn
after the same step, process 0 gathers where the tensors lie, and its thread writes the manifest and renames the
directory. Before the rename there is no checkpoint; after it, there is a whole one. A process by itself does all of
that in its thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from dinov2.train.checkpoint import CheckpointDirectory
from dinov2.train.metrics import NonFiniteError, way_back
from dinov2.train.processes import PeerError, Processes
from dinov2.train.staging import Stager, WrittenPart, non_finite_tensors

Result = TypeVar("Result")
FAILED = -1


class CheckpointError(OSError):
    """A checkpoint could not be written. Those before it are whole, and nothing of it is left."""


class CheckpointWarning(UserWarning):
    """A checkpoint was given up when the run ended by another error."""


@dataclass
class Save:
    """A checkpoint in the making.

    Attributes:
        step: finished steps.
        values: plain values for the manifest.
        part: what this process writes.
        is_gathered: whether all parts are written, and process 0 knows of them.
        completion: manifest and name; process 0 has it once the parts are gathered.
    """

    step: int
    values: dict[str, Any]
    part: Future[WrittenPart]
    is_gathered: bool = False
    completion: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether something that this process did for it has failed already."""
        done = [future for future in (self.part, self.completion) if future is not None and future.done()]
        return any(future.exception() is not None for future in done)


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time. Every process has one and calls the same methods after a step.

    As a context it finishes the save in flight, however it is left. After an error the other processes may be
    anywhere, so several then finish what they had already agreed on, and remove the rest.
    """

    def __init__(self, directory: CheckpointDirectory, processes: Processes) -> None:
        self.directory = directory
        self.processes = processes
        self._stager = Stager(processes)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._save: Save | None = None
        self._written = 0

    @property
    def progress(self) -> int:
        """The step up to which this process has written everything, or FAILED, to be agreed on."""
        if self._save is not None:
            if self._save.has_failed:
                return FAILED
            if self._save.part.done():
                self._written = self._save.step
        return self._written

    def save(self, step: int, state: dict[str, Any], values: dict[str, Any]) -> None:
        """Begin to save tensors and plain values of ``step``; on return training may change the tensors.

        Raises:
            NonFiniteError: a tensor holds a NaN or an infinity; nothing is saved.
            CheckpointError: it cannot be written, or the save before it could not; PeerError in other processes.
        """
        self.finish()
        staged = self._stager.stage(state)
        self.processes.together(lambda: self._refuse_non_finite(step, staged))
        self.processes.first(lambda: self._attempt(step, lambda: self.directory.begin(step)))
        self._save = save = Save(step, values, self._thread.submit(self._stager.write, self.directory.partial(step)))
        if self.processes.group is None:  # nobody else to wait for
            save.is_gathered = True
            save.completion = self._thread.submit(lambda: self._complete(save, [save.part.result()]))

    def after_step(self, progress: int) -> None:
        """Go on with the save in flight, given the least :attr:`progress` of all processes.

        Raises:
            CheckpointError: it could not be written; PeerError in other processes.
        """
        if self._save is None:
            return
        if progress == FAILED:
            self.finish()
        elif progress == self._save.step and not self._save.is_gathered:
            with self._given_up_on_error():
                self._gather(self._save)

    def finish(self) -> None:
        """Wait until the save in flight is complete in all processes.

        Raises:
            CheckpointError: it could not be written; PeerError in other processes.
        """
        if (save := self._save) is None:
            return
        wait([save.part])
        with self._given_up_on_error():
            if not save.is_gathered:
                self._gather(save)
            if save.completion is not None:
                wait([save.completion])
            self.processes.first(lambda: self._attempt(save.step, lambda: _result(save.completion)))
        self._save = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._thread.shutdown()  # waits for all that was begun
            if error is not None and self.processes.is_first:
                self.directory.clean()
                if self._save is not None and not (path := self.directory.path(self._save.step)).exists():
                    message = f"checkpoint {path} was not finished and is removed"
                    warnings.warn(message, CheckpointWarning, stacklevel=2)

    def _gather(self, save: Save) -> None:
        part = self.processes.together(lambda: self._attempt(save.step, save.part.result))
        parts = self.processes.gather(part)
        save.is_gathered = True
        if self.processes.is_first:
            save.completion = self._thread.submit(self._complete, save, parts)

    def _complete(self, save: Save, parts: list[WrittenPart]) -> None:
        files = self._stager.write_metadata(self.directory.partial(save.step), parts)
        self.directory.finish(save.step, save.values, files)

    def _refuse_non_finite(self, step: int, tensors: dict[str, Any]) -> None:
        if spoilt := non_finite_tensors(tensors):
            raise NonFiniteError(
                f"training stopped: after step {step} the tensor {spoilt[0]} holds NaN or infinity;"
                f" {way_back(self.directory.latest())}"
            )

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except (CheckpointError, PeerError):
            self._save = None
            if self.processes.is_first:
                self.directory.clean()
            raise

    def _attempt(self, step: int, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except Exception as error:
            raise CheckpointError(
                f"saving checkpoint {self.directory.path(step)} failed: {_reason(error)};"
                f" {way_back(self.directory.latest())}"
            ) from error


def _result(future: Future[None] | None) -> None:
    if future is not None:
        future.result()


def _reason(error: BaseException) -> str:
    """The operating system's word, which PyTorch's own complaints may hide."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error).partition("\n")[0]
