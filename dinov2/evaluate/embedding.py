"""Features of all images of a dataset in a folder: ``features.npy``, and ``images.csv`` with the names of its rows."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data import AugmentationConfig, ImageDataset, UnreadableDatasetError, UnreadableImageError
from dinov2.data.files import escaped, shown
from dinov2.data.workers import next_of_workers, start_worker
from dinov2.evaluate.probe import central_view
from dinov2.models import VisionTransformer

FEATURES, IMAGES, SKIPPED = "features.npy", "images.csv", "skipped.csv"

Views = tuple[Tensor, dict[int, str]]
"""Views of a batch's readable images [b, C, size, size]; by number in the dataset, why the others cannot be read."""


@dataclass(frozen=True)
class Embedding:
    """Counts of :func:`embed`: rows of features, numbers in a row, and images that could not be read."""

    images: int
    width: int
    skipped: int


@torch.inference_mode()
def embed(
    model: VisionTransformer,
    dataset: ImageDataset,
    names: Sequence[str],
    output: Path,
    augmentation: AugmentationConfig,
    *,
    batch_size: int = 64,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda images: None,
) -> Embedding:
    """Write the class tokens of images into a new folder. The model sees the same views as in :class:`FolderProbe`.

    ``features.npy`` is float32 [N, D]. Column ``image`` of ``images.csv`` has the name of each row's image. Images that
    cannot be read have no row; ``skipped.csv`` has their names and the reasons. In names that are not UTF-8, other
    bytes become ``\\xNN`` (see :func:`~dinov2.data.escaped`). The folder appears only when it is complete. The disk's
    space is taken at the start. Within ``torch.autocast``, the model runs in that precision.

    Args:
        model: a model in eval mode, on any device.
        dataset: the images.
        names: names of the images, as :func:`~dinov2.data.image_names` gives them.
        output: a new or empty folder.
        augmentation: gives size, mean, std and number of channels; its random parts are not used.
        batch_size: images of a forward pass.
        num_workers: number of processes that read and decode images; 0 uses this process.
        progress: called after each batch with the number of finished images.

    Raises:
        FileExistsError: the folder is not empty.
        OSError: the folder cannot be written, or the disk is too small.
        ValueError: there is no image, there is not one name for each, the size is not a multiple of the model's patch
            size, or the number of channels differs.
        UnreadableDatasetError: no image can be read.
        LostWorkerError: a worker was killed.
    """
    _check(model, output, augmentation, len(dataset), len(names))
    width, done, skipped, reason = model.config.embed_dim, 0, 0, ""
    with _new_folder(output) as folder:
        rows = _reserved(folder / FEATURES, len(dataset), width, sum(map(len, names)))
        with _table(folder / IMAGES, "image") as add_image, _table(folder / SKIPPED, "image", "reason") as add_skipped:
            device = next(model.parameters()).device
            for views, unreadable in _batches(dataset, augmentation, batch_size, num_workers):
                start = done + skipped
                for number in range(start, start + len(views) + len(unreadable)):
                    if number in unreadable:
                        reason = reason or unreadable[number]
                        add_skipped(names[number], unreadable[number])
                    else:
                        add_image(names[number])
                if len(views):
                    features = model(views.to(device, non_blocking=True))  # [b, D]
                    rows[done : done + len(views)] = features.float().cpu().numpy()
                done, skipped = done + len(views), skipped + len(unreadable)
                progress(done + skipped)
        if done == 0:
            raise UnreadableDatasetError(f"none of {len(dataset)} images can be read; {reason}")
        rows.flush()
        del rows
        _shorten(folder / FEATURES, done, width)
        if not skipped:
            (folder / SKIPPED).unlink()
    return Embedding(done, width, skipped)


def _check(model: VisionTransformer, output: Path, augmentation: AugmentationConfig, images: int, names: int) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: expected a new or an empty folder, got {shown(str(output))}")
    if images == 0:
        raise ValueError("dataset: expected at least one image, got none")
    if names != images:
        raise ValueError(f"names: expected one for each of {images} images, got {names}")
    config = model.config
    if augmentation.global_size % config.patch_size:
        raise ValueError(
            f"size: expected a multiple of {config.patch_size}, the model's patch size, got {augmentation.global_size}"
        )
    if config.in_chans != augmentation.channels:
        raise ValueError(
            f"mean and std: expected {config.in_chans} values, one for each channel of the model, got"
            f" {augmentation.channels}"
        )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes ``output`` at the end. It is deleted after an error, but not if only the last step fails:
    then the error says where it is."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}.", dir=output.parent)) / "features"
        folder.mkdir()
    except OSError as error:
        raise type(error)(
            f"output: expected a folder that can be written, got {shown(str(output))}: {error.strerror or error}"
        ) from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    try:
        folder.replace(output)
    except OSError as error:
        raise type(error)(
            f"output: {shown(str(output))} cannot be written any more ({error.strerror or error}); the features are in"
            f" {shown(str(folder))}"
        ) from error
    folder.parent.rmdir()


def _reserved(path: Path, images: int, width: int, size_of_names: int) -> np.memmap[Any, np.dtype[np.float32]]:
    """A new array in a ``.npy`` file, float32 [images, width]. All space on the disk is taken at once: a disk that is
    too small is an error now, not a crash in the middle."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(images, width))
    expected, free = path.stat().st_size + size_of_names, shutil.disk_usage(path.parent).free
    if free < expected:
        raise OSError(f"output: expected {expected:,} bytes of free space for the features, got {free:,}")
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(f"output: no space for {expected:,} bytes of features: {error.strerror}") from error
    return rows


def _shorten(path: Path, images: int, width: int) -> None:
    """Leave the first ``images`` rows in the file of an array."""
    dtype = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    with path.open("r+b") as file:  # NumPy pads headers, so that this one is as long as that of more rows
        header = {"descr": dtype, "fortran_order": False, "shape": (images, width)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + images * width * np.dtype(np.float32).itemsize)


@contextmanager
def _table(path: Path, *columns: str) -> Iterator[Callable[..., None]]:
    """A function that adds a row to a new CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        yield lambda *row: writer.writerow(map(_as_text, row))


def _as_text(name: str) -> str:
    """The name itself, or escaped if it is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return escaped(name)
    return name


def _batches(
    dataset: ImageDataset, augmentation: AugmentationConfig, batch_size: int, num_workers: int
) -> Iterator[Views]:
    loader = DataLoader(
        _ViewsOfImages(dataset, augmentation),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collated,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    items, receive = iter(loader), next_of_workers if num_workers else next
    for _ in range(len(loader)):
        yield receive(items)


@dataclass(frozen=True)
class _ViewsOfImages(Dataset[tuple[int, "Tensor | str"]]):
    """Item i is i and the view of image i, or the reason why it cannot be read."""

    dataset: ImageDataset
    augmentation: AugmentationConfig

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, central_view(self.dataset[index], self.augmentation)
        except UnreadableImageError as error:
            return index, str(error)


def _collated(items: list[tuple[int, Tensor | str]]) -> Views:
    views = [view for _, view in items if isinstance(view, Tensor)]
    unreadable = {index: reason for index, reason in items if isinstance(reason, str)}
    return torch.stack(views) if views else torch.empty(0), unreadable
