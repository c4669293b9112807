"""What a checkpoint takes from this process: its part of the state, copied to the host, and written from there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from dinov2.models.checkpoints.run import METADATA, file_record
from dinov2.train.processes import Processes


@dataclass
class WrittenPart:
    """What one process wrote.

    Attributes:
        results: where PyTorch put each tensor.
        files: size and checksum of each file, by its name.
    """

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, dict[str, int]] = field(default_factory=dict)


class Stager:
    """Decides once which process writes which part of the state, and copies this one's to the host at each save.

    Split tensors are written by those who hold the parts, whole ones by one process each, evenly. The copies stay and
    are overwritten by the next save; a process needs host memory for what it writes, an N-th of the state.
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
            What was copied, as it is on the device, by full names.
        """
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=self.processes.is_first)
        if self._names != (names := list(planner.state_dict)):  # the same ones in every process
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
        """Write the copies, to the disk itself. Exchanges nothing with other processes and runs in any thread."""
        if not self._plan.items:
            return WrittenPart()
        results = _writer(directory).write_data(self._plan, _FromCopies(self._copies)).wait()
        names = {result.storage_data.relative_path for result in results}
        return WrittenPart(results, {name: file_record(directory / name) for name in sorted(names)})

    def write_metadata(self, directory: Path, parts: list[WrittenPart]) -> dict[str, dict[str, int]]:
        """Write what PyTorch must know of all parts, and return the records of all files. The first process does it."""
        _writer(directory).finish(self._metadata, [part.results for part in parts])
        files = {name: record for part in parts for name, record in part.files.items()}
        return files | {METADATA: file_record(directory / METADATA)}

    def _divide(self, planner: DefaultSavePlanner) -> None:
        plans = self.processes.gather(planner.create_local_plan())
        plans, self._metadata = self.processes.first(lambda: planner.create_global_plan(plans))
        self._plan = _writer(Path()).prepare_global_plan(plans)[self.processes.rank]


def non_finite_tensors(tensors: dict[str, Tensor]) -> list[str]:
    """Names of those that hold a NaN or an infinity. Reads each tensor once and asks the device once."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return []
    device = max((tensor.device for tensor in floating.values()), key=lambda device: device.type != "cpu")
    bounds = (torch.stack(torch.aminmax(tensor)) for tensor in floating.values())  # NaN if there is one
    finite = torch.stack([torch.isfinite(both).all().to(device) for both in bounds])
    return [name for name, is_finite in zip(floating, finite.tolist(), strict=True) if not is_finite]


class _FromCopies(DefaultSavePlanner):
    """Hands a writer the copies on the host."""

    def __init__(self, copies: dict[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._copies[write_item.index]


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: PyTorch's own would name the directory, which is renamed and may be copied."""


def _writer(directory: Path) -> _Writer:
    return _Writer(directory, per_thread_copy_ahead=0)  # everything is on the host already
