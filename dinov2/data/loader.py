"""Batches for pretraining. Each batch depends only on the seed and the step.

So batches are the same with any number of workers and after a restart. The images of a step are also the same with any
number of processes.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.data.augmentation import MultiCropAugmentation
from dinov2.data.batch import Batch, MultichannelBuffer, RawBatch, RGBBuffer, finish
from dinov2.data.config import DataConfig
from dinov2.data.decoding import Pixels, UnreadableImageError
from dinov2.data.masking import batch_masks
from dinov2.data.randomness import Stream, derived_generator, random_order
from dinov2.data.workers import next_of_workers, start_worker

MAX_ATTEMPTS = 1000  # after this many unreadable images in a row, the whole dataset counts as unreadable


class UnreadableDatasetError(ValueError):
    """No image of a dataset can be read, or none of very many that were tried."""


class UnreadableImageWarning(UserWarning):
    """Some images could not be read and were replaced by others."""


class ImageDataset(Protocol):
    """A dataset for :func:`batches`: it has a length, and its items are uint8 RGB ``[H, W, 3]`` arrays.

    With another number of channels, items are uint8, uint16 or float32 ``[H, W, C]``. An item that raises an
    :class:`UnreadableImageError` is replaced; any other error ends the run. A dataset that mostly waits for a network
    may have an attribute ``concurrent_reads``: this many threads of each worker then read ahead of the augmentation.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Pixels: ...


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
    """Endless batches, from ``start_step`` on.

    Each epoch has an order of its own, which depends on the seed and the number of the epoch; a batch may cross the end
    of an epoch. The views of a sample depend on the seed and on its number in the run. The masks depend on the seed,
    the step and the rank. So a run resumes anywhere by passing the next step. Processes never share a sample: together
    they draw the images and views that one process would draw. An unreadable image is replaced by another one, chosen
    by the seed and the number of the sample, and a warning counts such images.

    Args:
        dataset: images; see :class:`ImageDataset`.
        config: augmentation, masks and the number of workers.
        batch_size: images of this process per batch.
        patch_size: side of a patch in pixels; both crop sizes must be multiples of it.
        seed: seed of the run, not negative.
        start_step: step of the first batch.
        rank: number of this process.
        world_size: number of processes; together they draw ``world_size * batch_size`` images a step.
        raw: leave RGB crops as they were cut, in a quarter of the bytes; :func:`~dinov2.data.finish` then carries out
            their plans on a device. See :func:`~dinov2.data.finishes_crops`.

    Raises:
        ValueError: an argument is out of its range, or a crop size is not a multiple of the patch size.
        UnreadableDatasetError: no image can be read (a ValueError, raised by the next batch).
        LostWorkerError: a worker was killed (an OSError, raised by the next batch).
    """
    if len(dataset) == 0:
        raise ValueError("dataset: expected at least one image, got none")
    if batch_size < 1 or seed < 0 or start_step < 0 or not 0 <= rank < world_size:
        raise ValueError(
            "arguments: expected batch_size of at least 1, seed and start_step of at least 0, and rank from 0 to"
            f" world_size - 1, got {batch_size=}, {seed=}, {start_step=}, {rank=}, {world_size=}"
        )
    for name in ("global_size", "local_size"):
        size = getattr(config.augmentation, name)
        if size % patch_size:
            raise ValueError(
                f"data.augmentation.{name}: expected a multiple of the patch size {patch_size}, got {size}"
            )

    augment = MultiCropAugmentation(config.augmentation)
    steps = _Steps(dataset, config, augment, batch_size, patch_size, seed, rank, world_size, raw)
    loader = DataLoader(
        steps,
        batch_size=None,  # an item is a whole batch
        sampler=itertools.count(start_step),
        num_workers=config.num_workers,
        collate_fn=_as_is,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    return _received(loader, len(dataset))


_Item = tuple[Batch | RawBatch | UnreadableDatasetError, dict[int, str]]
"""A batch, and the images that could not be read for it, with the reasons. An UnreadableDatasetError is returned, not
raised: PyTorch would add the worker's traceback to its message, which helps only with bugs in a dataset's code."""


@dataclass(frozen=True)
class _Steps(Dataset[_Item]):
    """Item s is the batch of step s."""

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
        samples = range(first, first + B)  # numbers of the samples in the run
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
        """The images of samples in order; the dataset's ``concurrent_reads`` limits how many are read at once."""
        concurrent_reads = getattr(self.dataset, "concurrent_reads", 1)
        if concurrent_reads == 1:
            yield from (self._read(sample, unreadable) for sample in samples)
            return
        with ThreadPoolExecutor(concurrent_reads) as pool:
            pending: deque[Future[Pixels]] = deque()
            for sample in samples:
                pending.append(pool.submit(self._read, sample, unreadable))
                if len(pending) > concurrent_reads:  # at most this many images wait in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _read(self, sample: int, unreadable: dict[int, str]) -> Pixels:
        """The image of a sample, or its first readable substitute; adds what is unreadable to ``unreadable``.

        Substitutes are random, because the neighbours of an unreadable image may be in the same damaged shard.
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
    """The batches of a loader. It warns each time the number of unreadable images has grown by a tenth."""
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
