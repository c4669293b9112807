"""The checkpoints of a run: which there are, and how one comes to be complete."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from dinov2.models.checkpoints.run import MANIFEST, load_checkpoint, manifest_text

__all__ = ["CheckpointDirectory", "load_checkpoint", "step_of"]

NAME = re.compile(r"step_(\d+)")
PARTIAL = ".partial"


class CheckpointDirectory:
    """The checkpoints of one run, ``step_00001000/`` and so on; see :mod:`dinov2.models.checkpoints.run`.

    One is written as ``step_00001000.partial`` and renamed when all of it is on the disk; one that is no longer kept is
    renamed to that before it is deleted. So a process that is killed at any moment leaves complete checkpoints and
    perhaps a ``.partial``, which nobody reads and the next save removes.

    Args:
        directory: where they are.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay, too; None: no others.
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
        """The newest complete checkpoint, None if there is none.

        Raises:
            ValueError: there are only checkpoints of the form that came before this one.
        """
        newest = next(reversed(self.all()), None)
        if newest is None and (former := sorted(self.directory.glob("step_*.pt"))):
            raise ValueError(
                f"{former[-1]} is a checkpoint of an earlier version, which kept one file each; this version cannot"
                " continue from it: start again with another --output"
            )
        return newest

    def path(self, step: int) -> Path:
        """The checkpoint of ``step`` finished steps, once it is complete."""
        return self.directory / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """The same while it is being written."""
        return self.path(step).with_suffix(PARTIAL)

    def begin(self, step: int) -> None:
        """Make room for the files of a checkpoint, and remove what an interrupted save left."""
        self.clean()
        self.partial(step).mkdir(parents=True)

    def clean(self) -> None:
        """Remove everything that is not complete; nothing must be in the making."""
        for leftover in self.directory.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)

    def finish(self, step: int, values: dict[str, Any], files: dict[str, dict[str, int]]) -> None:
        """Write the manifest, give the checkpoint its name, and delete those that are no longer kept."""
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
    """The number of finished steps that a checkpoint's name tells."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"a checkpoint is a directory named step_<number>, but this is {path}")
    return int(match.group(1))


def _sync_directory(directory: Path) -> None:
    """Make new names in it last: they must reach the disk as well as what they name."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
