"""Checkpoints of pretraining on disk. They can be read without a process group::

    step_00001000/
        __0_0.distcp, __1_0.distcp, ...  tensors, or shards of them, written by process 0, 1, ...
        .metadata                        names of the tensors, and the place of each shard
        manifest.json                    plain values; size and checksum of every other file

:mod:`torch.distributed.checkpoint` writes the first two, and its tools can read them. The manifest is written last, and
then the directory gets its final name.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from dinov2.models.checkpoints.finding import MANIFEST, METADATA

LONE_STUDENT = "student"
"""Name of the only student of a pretraining run. It is not a prefix of tensor names."""
PARTS = ("student", "teacher", "objective", "optimizer")
"""The parts of a checkpoint to which its tensors belong."""
CHUNK = 1 << 22  # bytes read at once for a checksum
METADATA_TYPES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""The classes in PyTorch's pickled metadata of tensors, beside dtypes. Nothing else is ever unpickled."""


def load_checkpoint(path: str | Path, parts: Collection[str] = PARTS) -> dict[str, Any]:
    """Read a whole checkpoint, written by any number of processes, into plain tensors on the CPU.

    Args:
        path: a directory such as ``checkpoints/step_00001000``.
        parts: the parts to read, out of student, teacher, objective and optimizer.

    Returns:
        student and teacher: tensors by facebook's names, ``backbone.cls_token`` and so on; objective: its centres, if
        it has any; optimizer: AdamW's step, exp_avg and exp_avg_sq of each of the student's parameters by its name.
        The values of the manifest are there, too: step (number of finished steps), num_images, scalars, loss_scale, and
        vit (the configuration of each student's backbone, by its name).

    Raises:
        ValueError: the checkpoint is damaged, or is not a checkpoint of pretraining.
    """
    checkpoint = RunCheckpoint(path)
    checkpoint.verify(checkpoint.files)
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if checkpoint.place(name)[0] in parts}
    tensors = {name: torch.empty(tensor.size, dtype=tensor.properties.dtype) for name, tensor in stored.items()}
    checkpoint.read_into(tensors)
    content: dict[str, Any] = {part: {} for part in parts}
    for name, tensor in tensors.items():
        *groups, last = checkpoint.place(name)
        inside = content
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[last] = tensor
    return checkpoint.values | content


class RunCheckpoint:
    """A checkpoint on disk.

    Attributes:
        path: directory of the checkpoint.
        values: plain values; see :func:`load_checkpoint`.
        files: size in bytes and CRC-32 of each file, by file name.

    Raises:
        ValueError: there is no manifest, or a file does not have the size in the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            text = (self.path / MANIFEST).read_text()
            manifest = json.loads(text)
            self.values: dict[str, Any] = manifest["values"]
            self.files: dict[str, dict[str, int]] = manifest["files"]
            if manifest_text(self.values, self.files) != text:
                raise ValueError(f"wrong checksum of {MANIFEST}")
            for name, record in self.files.items():
                if (size := (self.path / name).stat().st_size) != record["bytes"]:
                    raise ValueError(f"{name} has {size} bytes instead of {record['bytes']}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(error) from error

    def verify(self, files: Iterable[str]) -> None:
        """Check the checksums of ``files``.

        Raises:
            ValueError: a file has changed since it was written.
        """
        for name in files:
            if file_record(self.path / name) != self.files[name]:
                raise self._unreadable(f"wrong checksum of {name}")

    @cached_property
    def metadata(self) -> Metadata:
        """PyTorch's metadata of the tensors. Call :meth:`verify` first."""
        try:
            with (self.path / METADATA).open("rb") as file:
                metadata: Metadata = _MetadataUnpickler(file).load()
            return metadata
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise self._unreadable(error) from error

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of every tensor by its full name, such as ``student.backbone.cls_token``."""
        return cast(dict[str, TensorStorageMetadata], self.metadata.state_dict_metadata)  # no others are unpickled

    def place(self, name: str) -> tuple[str, ...]:
        """The place of a tensor: its part, its name there and, for the optimiser, the name of the moment."""
        place: tuple[str, ...] = self.metadata.planner_data[name]
        return place

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Overwrite tensors, given by their full names, with those of the checkpoint.

        A process reads only its own shard of a DTensor; the checkpoint may be split in any way. The other processes
        need not call this.

        Raises:
            ValueError: a tensor is missing or has another shape, or the files cannot be read.
        """
        for name, target in targets.items():
            if name not in self.tensors:
                raise ValueError(f"checkpoint {self.path} does not fit: it has no {name}")
            if (size := self.tensors[name].size) != target.shape:
                raise ValueError(
                    f"checkpoint {self.path} does not fit: {name} is {list(size)} instead of {list(target.shape)}"
                )
        reader, planner = _Reader(self.path, self.metadata), DefaultLoadPlanner(flatten_state_dict=False)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist is meant to do that
                load(dict(targets), storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise self._unreadable(next(iter(error.failures.values()))[0]) from error

    def _unreadable(self, reason: object) -> ValueError:
        return ValueError(
            f"checkpoint {self.path} cannot be read ({str(reason).splitlines()[0]});"
            " move it away to continue from the checkpoint before it"
        )


def manifest_text(values: dict[str, Any], files: dict[str, dict[str, int]]) -> str:
    """The text of a manifest, which ends with its own checksum."""
    content = {"values": values, "files": files}
    return json.dumps({**content, "crc32": zlib.crc32(json.dumps(content).encode())}, indent=1) + "\n"


def file_record(path: Path) -> dict[str, int]:
    """A file's record in the manifest: its size in bytes and its CRC-32, computed at 2 GB per second."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}


class _Reader(FileSystemReader):
    """Reads with safely unpickled metadata. PyTorch would run any code that the metadata names."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in METADATA_TYPES.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which is no part of a checkpoint")
        return super().find_class(module, name)
