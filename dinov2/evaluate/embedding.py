"""Features of all images of a dataset in a folder: ``features.npy``, and ``images.csv`` with the names of its rows."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data import AugmentationConfig, ImageDataset, UnreadableDatasetError, UnreadableImageError
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
    cannot be read have no row; ``skipped.csv`` has their names and the reasons. The folder appears only when it is
    complete. Within ``torch.autocast``, the model runs in that precision.

    Args:
        model: a model in eval mode, on any device.
        dataset: the images.
        names: names of the images.
        output: a new or empty folder.
        augmentation: gives size, mean, std and number of channels; its random parts are not used.
        batch_size: images of a forward pass.
        num_workers: number of processes that read and decode images; 0 uses this process.
        progress: called after each batch with the number of finished images.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the size is not a multiple of the model's patch size, or the number of channels differs.
        UnreadableDatasetError: no image can be read.
        LostWorkerError: a worker was killed.
    """
    _check(model, output, augmentation)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        shape = (len(dataset), model.config.embed_dim)
        rows = np.lib.format.open_memmap(Path(temporary) / "rows.npy", mode="w+", dtype=np.float32, shape=shape)
        done, skipped = 0, dict[int, str]()
        device = next(model.parameters()).device
        for views, unreadable in _batches(dataset, augmentation, batch_size, num_workers):
            skipped |= unreadable
            if len(views):
                features = model(views.to(device, non_blocking=True))  # [b, D]
                rows[done : done + len(views)] = features.float().cpu().numpy()
                done += len(views)
            progress(done + len(skipped))
        if done == 0:
            raise UnreadableDatasetError(f"none of {len(dataset)} images can be read; {next(iter(skipped.values()))}")
        np.save(folder / FEATURES, rows[:done])
        _write_csv(folder / IMAGES, ["image"], ([name] for i, name in enumerate(names) if i not in skipped))
        if skipped:
            _write_csv(folder / SKIPPED, ["image", "reason"], ([names[i], reason] for i, reason in skipped.items()))
        folder.replace(output)
    return Embedding(done, shape[1], len(skipped))


def _check(model: VisionTransformer, output: Path, augmentation: AugmentationConfig) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output: expected a new or an empty folder, got {output}")
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


def _write_csv(path: Path, columns: list[str], rows: Iterator[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
