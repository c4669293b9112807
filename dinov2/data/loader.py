"""Batches for pretraining, each a pure function of the seed and the step: the same with any number of workers, after a
restart, and for the images also with any number of processes."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.configuration import Config, CountOr0
from dinov2.data.augmentation import AugmentationConfig, MultiCropAugmentation
from dinov2.data.batch import Batch, MultichannelBuffer, RawBatch, RGBBuffer, finish
from dinov2.data.decoding import Pixels, UnreadableImageError
from dinov2.data.masking import MaskConfig, batch_masks
from dinov2.data.randomness import Stream, derived_generator, random_order
from dinov2.data.workers import next_of_workers, start_worker

MAX_ATTEMPTS = 1000  # unreadable images in a row: then it is the whole dataset that cannot be read


class UnreadableDatasetError(ValueError):
    """No image can be read, or none of very many that were tried."""


class UnreadableImageWarning(UserWarning):
    """Images could not be read, and others took their places."""


class ImageDataset(Protocol):
    """What :func:`batches` reads from: anything with a length whose items are uint8 RGB ``[H, W, 3]`` arrays.

    Of images with another number of channels, items are uint8, uint16 or float32 ``[H, W, C]``. An item that raises an
    :class:`UnreadableImageError` is replaced; any other error ends the run. A dataset that mostly waits, for a network,
    may have an attribute ``concurrent_reads``: so many threads of a worker then read ahead of the augmentation.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Pixels: ...


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config, at="data"):
    """Where images come from and what is made of them."""

    root: str | Path | None = None
    """Images come from this folder, nested in any way, or from this folder or URL of tar shards or of a saved Hugging
    Face dataset. None takes the bundled photographs."""
    num_workers: CountOr0 = 2
    """This many processes prepare batches; 0 prepares them in the training process. Results do not depend on it."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random views are drawn like this."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """Patches that the student must predict are masked like this."""


def batches(
    dataset: ImageDataset,
    config: DataConfig,
    *,
    batch_size: int,
    patch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    raw: bool = False,
) -> Generator[Batch | RawBatch, None, None]:
    """Batches without end, from ``start_step`` on.

    Every pass over the images has an order of its own, derived from the seed and the number of the pass; batches run
    on across passes. The views of a sample depend on the seed and its number in the run, the masks on the seed, step
    and rank. So to resume is to pass the next step, in the middle of a pass too, and processes never share a sample:
    whatever their number, together they draw the images and views that one process would draw. An image that cannot be
    read is replaced by another, which the seed and the number of the sample choose, with a warning that counts such
    images.

    Args:
        dataset: images; see :class:`ImageDataset`.
        config: augmentation, masks and the number of workers.
        batch_size: images of this process per batch.
        patch_size: side of a patch, in pixels; both crop sizes must be multiples of it.
        seed: seed of the run, not negative.
        start_step: step of the first batch.
        rank: number of this process.
        world_size: number of processes; together they draw ``world_size * batch_size`` images a step.
        raw: leave RGB crops as they were cut, a quarter of the bytes, for :func:`~dinov2.data.finish` to carry out
            their plans on a device; see :func:`~dinov2.data.finishes_crops`.

    Raises:
        ValueError: an argument is out of its range, a crop is no multiple of the patch.
        UnreadableDatasetError: no image can be read; a ValueError, when a batch is asked for.
        LostWorkerError: a worker was killed; an OSError, when a batch is asked for.
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, but is empty")
    if batch_size < 1 or seed < 0 or start_step < 0 or not 0 <= rank < world_size:
        raise ValueError(
            "batch_size must be positive, seed and start_step not negative and rank below world_size, but they are "
            f"{batch_size=}, {seed=}, {start_step=}, {rank=}, {world_size=}"
        )
    for name in ("global_size", "local_size"):
        size = getattr(config.augmentation, name)
        if size % patch_size:
            raise ValueError(f"{name} must be a multiple of the patch size {patch_size}, but is {size}")

    augment = MultiCropAugmentation(config.augmentation)
    steps = _Steps(dataset, config, augment, batch_size, patch_size, seed, rank, world_size, raw)
    loader = DataLoader(
        steps,
        batch_size=None,  # an item is a batch already
        sampler=itertools.count(start_step),
        num_workers=config.num_workers,
        collate_fn=_as_is,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    return _received(loader, len(dataset))


_Item = tuple[Batch | RawBatch | UnreadableDatasetError, dict[int, str]]
"""A batch, and which images could not be read for it, with the reasons. An error raised in a worker would arrive with a
traceback in its message, which is right for a mistake in the code of a dataset and wrong for a folder that is gone."""


@dataclass(frozen=True)
class _Steps(Dataset[_Item]):
    """Item s belongs to step s."""

    dataset: ImageDataset
    config: DataConfig
    augment: MultiCropAugmentation
    batch_size: int
    patch_size: int
    seed: int
    rank: int
    world_size: int
    raw: bool

    def __getitem__(self, step: int) -> _Item:
        unreadable: dict[int, str] = {}
        try:
            return self._batch(step, unreadable), unreadable
        except UnreadableDatasetError as error:
            return error, unreadable

    def _batch(self, step: int, unreadable: dict[int, str]) -> Batch | RawBatch:
        B, views = self.batch_size, self.config.augmentation
        new_buffer = RGBBuffer if views.channels == 3 else MultichannelBuffer
        global_buffer = new_buffer(views, 2, B, views.global_size)
        local_buffer = new_buffer(views, views.local_crops, B, views.local_size)
        first = (step * self.world_size + self.rank) * B
        samples = range(first, first + B)  # their numbers in the run
        for i, (sample, image) in enumerate(zip(samples, self._images(samples, unreadable), strict=True)):
            cut = self.augment.cut(image, derived_generator(self.seed, Stream.AUGMENTATION, sample))
            for buffer, crops in zip((global_buffer, local_buffer), cut, strict=True):
                for number, crop in enumerate(crops):
                    buffer.put(number, i, crop)

        side = views.global_size // self.patch_size
        masks = batch_masks((side, side), 2 * B, self.config.masks, seed=self.seed, position=(step, self.rank))
        batch = cast(
            Batch | RawBatch,
            {
                "global_crops": global_buffer.crops(),
                "local_crops": local_buffer.crops(),
                "masks": torch.from_numpy(masks),
            },
        )
        return batch if self.raw else finish(batch, views, torch.device("cpu"))

    def _images(self, samples: range, unreadable: dict[int, str]) -> Iterator[Pixels]:
        """The images of samples in their order, as many at once as the dataset allows."""
        concurrent_reads = getattr(self.dataset, "concurrent_reads", 1)
        if concurrent_reads == 1:
            yield from (self._read(sample, unreadable) for sample in samples)
            return
        with ThreadPoolExecutor(concurrent_reads) as pool:
            pending: deque[Future[Pixels]] = deque()
            for sample in samples:
                pending.append(pool.submit(self._read, sample, unreadable))
                if len(pending) > concurrent_reads:  # no more than this wait in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _read(self, sample: int, unreadable: dict[int, str]) -> Pixels:
        """The image of a sample, or the first readable one of its substitutes; notes what was unreadable.

        Substitutes are random, since neighbours in a dataset share their shard and its fate.
        """
        number = len(self.dataset)
        image = random_order(number, self.seed, Stream.ORDER, sample // number)[sample % number]
        substitutes = (random_order(number, self.seed, Stream.SUBSTITUTES, sample)[i] for i in range(number))
        for index in itertools.islice(itertools.chain([image], substitutes), MAX_ATTEMPTS):
            try:
                return self.dataset[index]
            except UnreadableImageError as error:
                unreadable[index] = str(error)
        tried = min(number, MAX_ATTEMPTS)
        raise UnreadableDatasetError(f"tried {tried} of {number} images, and none can be read; {unreadable[image]}")


def _as_is(item: Any) -> Any:
    return item


def _received(loader: DataLoader[_Item], number: int) -> Generator[Batch | RawBatch, None, None]:
    """The batches of a loader, with a warning whenever a tenth more of its ``number`` images were unreadable."""
    items, receive = iter(loader), next_of_workers if loader.num_workers else next
    seen, warned = set[int](), 0
    while True:
        batch, unreadable = receive(items)
        if isinstance(batch, UnreadableDatasetError):
            raise batch
        seen.update(unreadable)
        if len(seen) > 1.1 * warned:
            warned = len(seen)
            warnings.warn(
                f"skipped unreadable images, {warned} of {number} so far; {next(reversed(unreadable.values()))}",
                UnreadableImageWarning,
                stacklevel=2,
            )
        yield batch
