"""Checkpoints: one file per step, complete or not there at all."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE_NAME = re.compile(r"step_(\d+)\.pt")


class CheckpointDirectory:
    """The checkpoints of one run, ``step_00001000.pt`` and so on, of which the newest ``keep`` stay.

    A checkpoint is written under another name, flushed to the disk and then renamed: a process killed while it saves
    leaves a ``.partial`` file, which nobody reads and the next save removes.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted((path for path in self.directory.iterdir() if FILE_NAME.fullmatch(path.name)), key=step_of)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, None if there is none."""
        return next(reversed(self.all()), None)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write ``state``, made of tensors, numbers, strings, lists and dictionaries, as the state of ``step``."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.partial"):
            leftover.unlink()
        path = self.directory / f"step_{step:08d}.pt"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_directory(self.directory)
        for old in self.all()[: -self.keep]:
            old.unlink()
        return path


def step_of(path: Path) -> int:
    """The number of finished steps that a checkpoint's name tells."""
    match = FILE_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"a checkpoint is named step_<number>.pt, but this file is {path}")
    return int(match.group(1))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are ever unpickled.

    Raises:
        ValueError: the file is damaged or is no checkpoint of pretraining.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load notices missing bytes, but no changed ones
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}); move it away to continue from the checkpoint before it"
        ) from error
    if not isinstance(state, dict) or not {"step", "student", "teacher", "optimizer"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of pretraining: expected step, student, teacher and optimizer in it")
    return state


def non_finite_tensors(state: Any, name: str = "") -> Iterator[str]:
    """Names of the tensors inside ``state`` that hold a NaN or an infinity."""
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(torch.isfinite(state).all()):
            yield name
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from non_finite_tensors(value, f"{name}.{key}" if name else str(key))


def _sync_directory(directory: Path) -> None:
    """Make a rename last: the directory's own entry must reach the disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
