"""Checkpoints written while training goes on.

A save begins after a step: each process copies its part of the state to the host, and a thread writes the copy to disk.
The threads exchange nothing, so they neither wait for another process nor disturb the collectives of training.

The processes agree through :class:`~dinov2.train.processes.StepAgreement`: after every step, each process tells up to
which step it has written everything. So all processes learn after the same step that a save is written. Then process 0
gathers where each tensor is, and its thread writes the manifest and renames the directory. Before the rename there is
no checkpoint; after it there is a complete one. A run of one process does all of this in its thread.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from dinov2.models.checkpoints.finding import MANIFEST, METADATA
from dinov2.models.checkpoints.run import file_record, manifest_text
from dinov2.train.metrics import NonFiniteError, way_back
from dinov2.train.processes import PeerError, Processes

Result = TypeVar("Result")
FAILED = -1

NAME = re.compile(r"step_(\d+)")
PARTIAL = ".partial"


class CheckpointError(OSError):
    """A checkpoint could not be written. Earlier checkpoints are complete, and its own files are removed."""


class CheckpointWarning(UserWarning):
    """A checkpoint was not finished because the run ended with another error."""


class CheckpointDirectory:
    """The checkpoints of one run, ``step_00001000/`` and so on; see :mod:`dinov2.models.checkpoints.run`.

    A checkpoint is written as ``step_00001000.partial`` and renamed when all of it is on the disk. An old checkpoint is
    renamed to ``.partial`` before it is deleted. So a process that is killed at any moment leaves complete checkpoints
    and perhaps a ``.partial``, which nobody reads and the next save removes.

    Args:
        directory: folder of the checkpoints.
        keep: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; None keeps no others.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int | None = None) -> None:
        self.directory = directory
        self.keep = keep
        self.keep_every = keep_every

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted((path for path in self.directory.iterdir() if NAME.fullmatch(path.name)), key=step_of)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None if there is none.

        Raises:
            ValueError: there are only checkpoints in the form of an earlier version.
        """
        newest = next(reversed(self.all()), None)
        if newest is None and (former := sorted(self.directory.glob("step_*.pt"))):
            raise ValueError(
                f"{former[-1]} is a checkpoint of an earlier version, which wrote single files; this version cannot"
                " continue from it: start again with another --output"
            )
        return newest

    def path(self, step: int) -> Path:
        """Folder of the complete checkpoint after ``step`` steps."""
        return self.directory / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Folder of the same checkpoint while it is being written."""
        return self.path(step).with_suffix(PARTIAL)

    def begin(self, step: int) -> None:
        """Create the folder of a new checkpoint, and remove what an interrupted save left."""
        self.clean()
        self.partial(step).mkdir(parents=True)

    def clean(self) -> None:
        """Remove all incomplete checkpoints. Do not call it during a save."""
        for leftover in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)

    def finish(self, step: int, values: dict[str, Any], files: dict[str, dict[str, int]]) -> None:
        """Write the manifest, give the checkpoint its final name, and delete old checkpoints."""
        partial = self.partial(step)
        with (partial / MANIFEST).open("w") as file:
            file.write(manifest_text(values, files))
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(partial)
        partial.rename(self.path(step))
        _sync_directory(self.directory)
        for old in self.all()[: -self.keep]:
            if self.keep_every is None or step_of(old) % self.keep_every:
                shutil.rmtree(old.rename(old.with_suffix(PARTIAL)))


def step_of(path: Path) -> int:
    """The number of finished steps, from a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: expected a checkpoint, a directory named step_<number>, got {path}")
    return int(match.group(1))


def _sync_directory(directory: Path) -> None:
    """Write the names of new files to the disk; syncing a file does not sync its name."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Save:
    """A save in flight.

    Attributes:
        step: number of finished steps.
        values: plain values for the manifest.
        part: the part that this process writes.
        is_gathered: whether all parts are written and process 0 knows their records.
        completion: writing the manifest and renaming; only in process 0, and only after the parts are gathered.
    """

    step: int
    values: dict[str, Any]
    part: Future[WrittenPart]
    is_gathered: bool = False
    completion: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether this process has already failed to write its part or to complete the checkpoint."""
        done = [future for future in (self.part, self.completion) if future is not None and future.done()]
        return any(future.exception() is not None for future in done)


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time. Every process has a saver and calls its methods after a step.

    The context manager finishes the save in flight when it exits. After an error the state of the other processes is
    unknown. With several processes it then finishes only a save whose parts are gathered, and removes any other.
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
        """The last step whose part this process has written, or FAILED. The processes agree on the least of these."""
        if self._save is not None:
            if self._save.has_failed:
                return FAILED
            if self._save.part.done():
                self._written = self._save.step
        return self._written

    def save(self, step: int, state: dict[str, Any], values: dict[str, Any]) -> None:
        """Begin to save tensors and plain values of ``step``. Training may change the tensors after the return.

        Raises:
            NonFiniteError: a tensor holds a NaN or an infinity; nothing is saved.
            CheckpointError: this checkpoint or the one before it cannot be written; other processes get a PeerError.
        """
        self.finish()
        staged = self._stager.stage(state)
        self.processes.together(lambda: self._refuse_non_finite(step, staged))
        self.processes.first(lambda: self._attempt(step, lambda: self.directory.begin(step)))
        self._save = save = Save(step, values, self._thread.submit(self._stager.write, self.directory.partial(step)))
        if self.processes.group is None:  # there is no other process to wait for
            save.is_gathered = True
            save.completion = self._thread.submit(lambda: self._complete(save, [save.part.result()]))

    def after_step(self, progress: int) -> None:
        """Continue the save in flight, given the least :attr:`progress` of all processes.

        Raises:
            CheckpointError: the checkpoint could not be written; other processes get a PeerError.
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
            CheckpointError: the checkpoint could not be written; other processes get a PeerError.
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
            self._thread.shutdown()  # waits for all writes that have begun
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
    """The operating system's error, which PyTorch may wrap in its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error).partition("\n")[0]


@dataclass
class WrittenPart:
    """The files that one process wrote.

    Attributes:
        results: PyTorch's record of where each tensor is.
        files: size and checksum of each file, by file name.
    """

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)


class Stager:
    """Decides once which process writes which part of the state, and copies its own part to the host at each save.

    Each process writes its shards of split tensors. The whole tensors are divided evenly, each to one process. The
    copies stay in memory and the next save overwrites them: each of N processes needs host memory for 1/N of the state.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._names: list[str] = []
        self._plan = SavePlan([])
        self._metadata = Metadata({})
        self._copies: dict[MetadataIndex, Tensor] = {}

    def stage(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Copy this process's part of ``state``, tensors in nested dictionaries, to the host. All processes call it.

        Returns:
            The tensors on the device that were copied, by full name.
        """
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=self.processes.is_first)
        if self._names != (names := list(planner.state_dict)):  # every process has the same names
            self._names, self._copies = names, {}
            self._divide(planner)
        sources = {}
        for item in self._plan.items:
            source: Tensor = planner.lookup_object(item.index).detach()
            copy = self._copies.get(item.index)
            if copy is None:
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._copies[item.index] = copy
            copy.copy_(source, non_blocking=source.is_cuda)
            sources[item.index.fqn] = source
        if self.processes.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return sources

    def write(self, directory: Path) -> WrittenPart:
        """Write the copies and sync them to the disk. It needs no other process and may run in any thread."""
        if not self._plan.items:
            return WrittenPart()
        results = _writer(directory).write_data(self._plan, _FromCopies(self._copies)).wait()
        names = {result.storage_data.relative_path for result in results}
        return WrittenPart(results, {name: file_record(directory / name) for name in sorted(names)})

    def write_metadata(self, directory: Path, parts: list[WrittenPart]) -> dict[str, dict[str, int]]:
        """Write PyTorch's metadata of all parts, and return the records of all files. Only process 0 does it."""
        _writer(directory).finish(self._metadata, [part.results for part in parts])
        files = {name: record for part in parts for name, record in part.files.items()}
        return files | {METADATA: file_record(directory / METADATA)}

    def _divide(self, planner: DefaultSavePlanner) -> None:
        plans = self.processes.gather(planner.create_local_plan())
        plans, self._metadata = self.processes.first(lambda: planner.create_global_plan(plans))
        self._plan = _writer(Path()).prepare_global_plan(plans)[self.processes.rank]


def non_finite_tensors(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity. It reads each tensor once and waits for the device once."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return []
    device = max((tensor.device for tensor in floating.values()), key=lambda device: device.type != "cpu")
    bounds = (torch.stack(torch.aminmax(tensor)) for tensor in floating.values())  # NaN if the tensor has one
    finite = torch.stack([torch.isfinite(both).all().to(device) for both in bounds])
    return [name for name, is_finite in zip(floating, finite.tolist(), strict=True) if not is_finite]


class _FromCopies(DefaultSavePlanner):
    """Gives the writer the copies on the host."""

    def __init__(self, copies: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """No metadata: PyTorch would store the directory's name, but the directory is renamed and may be copied."""


def _writer(directory: Path) -> _Writer:
    return _Writer(directory, per_thread_copy_ahead=0)  # everything is on the host already
