"""What a command checks before it imports anything large: an error about a path appears at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.cli import UsageError
from dinov2.interrupts import uninterrupted

if TYPE_CHECKING:
    import torch


def device_of(name: str, *, field: str = "device", here: bool = True) -> torch.device:
    """:func:`~dinov2.train.processes.resolve_device` before any work, for all commands.

    Raises:
        UsageError: there is no such device; the message names the field by its dotted path.
    """
    with uninterrupted():
        from dinov2.train.processes import resolve_device

    try:
        return resolve_device(name, here=here)
    except ValueError as error:
        raise UsageError(f"{field.removesuffix('device')}{error}") from None


def check_device(name: str, *, field: str = "device", here: bool = True) -> None:
    """Check that a device can be had, as :func:`device_of` does. ``auto`` always can, which takes no PyTorch to say."""
    if name != "auto":
        device_of(name, field=field, here=here)


def check_output(folder: Path) -> None:
    """Check that a folder is one, or can be made and written.

    Raises:
        UsageError: it cannot.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise UsageError(f"output: expected a folder, got {folder}, but {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"output: expected a folder that can be written, got {folder}, but {place} cannot")


def check_images(root: str | os.PathLike[str] | None) -> None:
    """Check that a source of images is there, as far as its name tells: URLs and bundled photographs always are.

    Raises:
        ValueError: it is no folder.
    """
    from dinov2.data.sources import check_folder

    if root is not None and "://" not in os.fspath(root):
        check_folder(root)


def check_weights(source: Path) -> None:
    """Check that a run, a checkpoint or another file or folder of weights is there.

    Raises:
        FileNotFoundError: it is not.
    """
    from dinov2.models.checkpoints.finding import find_weights
    from dinov2.train.run_directory import is_run

    if not is_run(source):
        find_weights(source)
