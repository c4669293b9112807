"""Batches: a pure function of seed and step, whatever the number of workers."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import (
    AugmentationConfig,
    Batch,
    DataConfig,
    ImageFolder,
    MaskConfig,
    RawBatch,
    UnreadableImageError,
    batches,
    finish,
    loader,
)

VIEWS = AugmentationConfig(global_size=16, local_size=8, local_crops=3)
# Views that show which image they come from: no randomness that changes a uniform colour.
PLAIN = AugmentationConfig(
    global_size=8,
    local_size=8,
    local_crops=1,
    jitter=0.0,
    grayscale=0.0,
    solarize=0.0,
    mean=(0, 0, 0),
    std=(1 / 255,) * 3,
)


class Flat:
    """Image i is of level i everywhere."""

    def __init__(self, length: int, unreadable: tuple[int, ...] = ()) -> None:
        self.length, self.unreadable = length, unreadable

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        if index in self.unreadable:
            raise UnreadableImageError(f"cannot read image 'number {index}'")
        return np.full((20, 30, 3), index, np.uint8)


class Noise(Flat):
    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 256, (20, 30, 3)).astype(np.uint8)


IN_THIS_PROCESS = DataConfig(augmentation=VIEWS, num_workers=0)
both_kinds = pytest.mark.parametrize("raw", [False, True])


def draw(number: int, dataset: object, config: DataConfig | None = None, **options: int) -> list[Batch | RawBatch]:
    config = config or IN_THIS_PROCESS
    return list(islice(batches(dataset, config, **{"batch_size": 4, "patch_size": 4, "seed": 0} | options), number))


def images_of(batch: Batch) -> list[int]:
    """Which images of :class:`Flat` a batch was made of."""
    return batch["global_crops"][: len(batch["masks"]) // 2].mean(dim=(1, 2, 3)).round().int().tolist()


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_shapes_and_types() -> None:
    (batch,) = draw(1, Noise(10))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "global_crops": ((8, 3, 16, 16), torch.float32),
        "local_crops": ((12, 3, 8, 8), torch.float32),
        "masks": ((8, 16), torch.bool),
    }
    assert 1 <= batch["masks"].any(dim=1).sum() <= 4


def test_crops_are_in_crop_major_order() -> None:
    config = DataConfig(augmentation=PLAIN, num_workers=0)
    (batch,) = draw(1, Flat(200), config)
    levels = [batch[name].mean(dim=(1, 2, 3)).round().int().tolist() for name in ("global_crops", "local_crops")]
    assert levels == [images_of(batch) * 2, images_of(batch)]
    assert len(set(images_of(batch))) == 4


def test_no_local_crops() -> None:
    config = DataConfig(augmentation=AugmentationConfig(global_size=16, local_size=8, local_crops=0), num_workers=0)
    (batch,) = draw(1, Noise(10), config)
    assert batch["local_crops"].shape == (0, 3, 8, 8)


@both_kinds
def test_workers_do_not_change_the_batches(raw: bool) -> None:
    expected = draw(7, Noise(10), raw=raw)
    for workers in (1, 2):
        config = dataclasses.replace(IN_THIS_PROCESS, num_workers=workers)
        assert_equal(draw(7, Noise(10), config, raw=raw), expected)


class Distant(Noise):
    """Images that arrive after a while; notes how many were on their way at once."""

    concurrent_reads = 8

    def __init__(self, length: int, unreadable: tuple[int, ...] = ()) -> None:
        super().__init__(length, unreadable)
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __getitem__(self, index: int) -> np.ndarray:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01 * (index % 3))
        with self.lock:
            self.now -= 1
        Flat.__getitem__(self, index)  # raises for the unreadable
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:skipped unreadable")
def test_concurrent_reads_do_not_change_the_batches() -> None:
    one_by_one, distant = Distant(50, unreadable=(7, 20)), Distant(50, unreadable=(7, 20))
    one_by_one.concurrent_reads = 1
    assert_equal(draw(3, distant, batch_size=20), draw(3, one_by_one, batch_size=20))
    assert one_by_one.most == 1
    assert 4 < distant.most <= 8


@both_kinds
def test_resumed_run_continues_exactly(raw: bool) -> None:
    whole = draw(9, Noise(10), raw=raw)  # passes end inside the batches of steps 2, 4 and 7
    assert_equal(draw(5, Noise(10), start_step=4, raw=raw), whole[4:])
    config = dataclasses.replace(IN_THIS_PROCESS, num_workers=2)
    assert_equal(draw(3, Noise(10), config, start_step=6, raw=raw), whole[6:])


def test_seeds_and_steps_differ() -> None:
    first, second = draw(2, Noise(10))
    (other,) = draw(1, Noise(10), seed=1)
    for name in first:
        assert (first[name] != second[name]).any()
        assert (first[name] != other[name]).any()


def test_every_pass_holds_each_image_once_in_a_new_order() -> None:
    config = DataConfig(augmentation=PLAIN, num_workers=0)
    order = [image for batch in draw(15, Flat(12), config) for image in images_of(batch)]
    passes = [order[i : i + 12] for i in range(0, 60, 12)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert len({tuple(one) for one in passes}) == 5


def test_one_image_seen_again_looks_different() -> None:
    first, second = draw(2, Noise(1), batch_size=1)
    assert (first["global_crops"] != second["global_crops"]).any()


@both_kinds
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_images_of_one(world_size: int, raw: bool) -> None:
    def finished(**options: int) -> list[Batch]:
        return [finish(batch, VIEWS, torch.device("cpu")) for batch in draw(3, Noise(30), raw=raw, **options)]

    alone, each = finished(batch_size=6), 6 // world_size
    shared = [finished(batch_size=each, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(3):
        for name, crops in (("global_crops", 2), ("local_crops", 3)):
            parts = [of_rank[step][name].unflatten(0, (crops, each)) for of_rank in shared]
            torch.testing.assert_close(torch.cat(parts, dim=1).flatten(0, 1), alone[step][name], rtol=0, atol=0)
        masks = [of_rank[step]["masks"] for of_rank in shared]
        assert all((first != second).any() for first, second in itertools.combinations(masks, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_image_goes_to_two_processes(world_size: int) -> None:
    config = DataConfig(augmentation=PLAIN, num_workers=0)
    seen = []
    for rank in range(world_size):
        of_rank = draw(12, Flat(24 * world_size), config, batch_size=2, rank=rank, world_size=world_size)
        seen += [image for batch in of_rank for image in images_of(batch)]
    assert sorted(seen) == list(range(24 * world_size))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_and_counted(workers: int) -> None:
    dataset, config = Flat(12, unreadable=(3, 4, 11)), DataConfig(augmentation=PLAIN, num_workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [images_of(batch) for batch in draw(6, dataset, config)]
        alone = [images_of(batch) for batch in draw(6, dataset, DataConfig(augmentation=PLAIN, num_workers=0))]
    expected = [images_of(batch) for batch in draw(6, Flat(12), DataConfig(augmentation=PLAIN, num_workers=0))]
    replaced = []
    for image, substitute in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        if image in dataset.unreadable:
            replaced.append(substitute)
        else:
            assert substitute == image
    assert len(replaced) == 6
    assert len(set(replaced)) > 2
    assert not set(replaced) & set(dataset.unreadable)
    assert found == alone
    messages = [str(warning.message) for warning in caught if "unreadable" in str(warning.message)]
    assert 2 <= len(messages) <= 6  # each image once a run, not once a pass; these are two runs
    assert messages[-1].startswith("skipped unreadable images, 3 of 12 so far; cannot read image 'number ")


def test_corrupt_files_are_skipped(tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(Noise(5)[i]).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"skipped unreadable images, 1 of 5 so far; cannot read image '.*2\.png'"):
        first = draw(2, ImageFolder(tmp_path))
    with pytest.warns(UserWarning, match="1 of 5"):
        assert_equal(draw(2, ImageFolder(tmp_path), DataConfig(augmentation=VIEWS, num_workers=2)), first)


def test_a_set_that_cannot_be_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MAX_ATTEMPTS", 20)
    with pytest.raises(ValueError, match="tried 20 of 300 images, and none can be read; cannot read image 'number"):
        draw(1, Flat(300, unreadable=tuple(range(300))))


def test_nothing_readable() -> None:
    with pytest.raises(ValueError, match="tried 3 of 3 images, and none can be read; cannot read image 'number"):
        draw(1, Flat(3, unreadable=(0, 1, 2)))


def test_other_errors_are_not_hidden() -> None:
    class Broken(Flat):
        def __getitem__(self, index: int) -> np.ndarray:
            raise KeyError("a mistake in the dataset")

    with pytest.raises(KeyError, match="a mistake in the dataset"):
        draw(1, Broken(3), DataConfig(augmentation=VIEWS, num_workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "expected batch_size of at least 1.*batch_size=0"),
        ({"seed": -1}, "seed and start_step of at least 0.*seed=-1"),
        ({"rank": 2, "world_size": 2}, "rank from 0 to world_size - 1.*rank=2, world_size=2"),
        ({"patch_size": 3}, "global_size: expected a multiple of the patch size 3, got 16"),
        ({"patch_size": 16}, "local_size: expected a multiple of the patch size 16, got 8"),
    ],
)
def test_bad_arguments_fail_at_the_call(options: dict[str, int], message: str) -> None:
    arguments = {"batch_size": 4, "patch_size": 4, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        batches(Noise(10), DataConfig(augmentation=VIEWS), **arguments)


def test_empty_dataset() -> None:
    with pytest.raises(ValueError, match="dataset: expected at least one image, got none"):
        batches(Noise(0), DataConfig(augmentation=VIEWS), batch_size=4, patch_size=4, seed=0)


def test_negative_workers() -> None:
    with pytest.raises(ValueError, match=r"data\.num_workers: expected at least 0, got -1"):
        DataConfig(num_workers=-1)


def test_masks_can_be_off() -> None:
    (batch,) = draw(1, Noise(10), DataConfig(augmentation=VIEWS, masks=MaskConfig(probability=0), num_workers=0))
    assert not batch["masks"].any()


def test_workers_use_one_thread() -> None:
    class Threads(Flat):
        def __getitem__(self, index: int) -> np.ndarray:
            return np.full((8, 8, 3), 16 * torch.get_num_threads(), np.uint8)

    (batch,) = draw(1, Threads(4), DataConfig(augmentation=PLAIN, num_workers=1))
    assert images_of(batch) == [16] * 4


def test_ctrl_c_is_for_the_training_process_alone() -> None:
    """A first Ctrl-C, which the training process handles, leaves the workers at work; a second ends all of them."""
    program = textwrap.dedent(
        """
        import signal
        import numpy as np
        from dinov2.data import AugmentationConfig, DataConfig, batches

        def handled(*_):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("handled", flush=True)

        signal.signal(signal.SIGINT, handled)
        images = np.zeros((10, 40, 40, 3), np.uint8)
        config = DataConfig(augmentation=AugmentationConfig(global_size=32, local_size=16), num_workers=2)
        stream = batches(images, config, batch_size=4, patch_size=8, seed=0)
        for _ in range(2):  # one of each worker: both are at work
            next(stream)
        print("running", flush=True)
        while signal.getsignal(signal.SIGINT) is handled:
            next(stream)
        for _ in range(20):  # more than was prepared before the signal
            next(stream)
        print("still running", flush=True)
        while True:
            next(stream)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as in a terminal
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "handled\n"
    assert process.stdout.readline() == "still running\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert group_is_gone(process.pid, seconds=10)


def group_is_gone(group: int, seconds: float) -> bool:
    """Whether all processes of a group end within some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
