"""What is said when a process that prepares batches is lost, or when what it reads is."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import (
    AugmentationConfig,
    DataConfig,
    ImageFolder,
    LostWorkerError,
    UnreadableDatasetError,
    UnreadableImageWarning,
    batches,
    lost_workers_explained,
    workers,
)
from dinov2.data.workers import next_of_workers
from tests.data.files import encode, noise

CONFIG = DataConfig(augmentation=AugmentationConfig(global_size=16, local_size=8, local_crops=2), num_workers=2)


class Raising:
    """Images, the fifth of which comes to grief."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> np.ndarray:
        if index == 5 and self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory is short
        if index == 5:
            raise self.error
        return noise(index)


def exhaust(dataset: object, config: DataConfig = CONFIG) -> None:
    with closing(batches(dataset, config, batch_size=4, patch_size=4, seed=0)) as stream:
        for _ in range(20):
            next(stream)


def test_a_killed_worker() -> None:
    with pytest.raises(
        LostWorkerError, match=r"lost a process that prepares batches \(.*\); most often .* memory is short"
    ):
        exhaust(Raising())


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("error", [ConnectionResetError("of the dataset"), RuntimeError("of the dataset")])
def test_errors_of_a_dataset_stay_what_they_are(error: Exception, number: int) -> None:
    config = DataConfig(augmentation=CONFIG.augmentation, num_workers=number)
    with pytest.raises(type(error), match="of the dataset"):
        exhaust(Raising(error), config)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", r"\(.*\(pid 7\) is killed by signal: Killed\)"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", r"\(.*\(pid\(s\) 7, 8\) exited unexpectedly\)"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "/dev/shm, .*, is full"),
    ],
)
def test_reports_of_pytorch(report: str, words: str) -> None:
    with pytest.raises(LostWorkerError, match=words), lost_workers_explained():
        raise RuntimeError(report)


def raises(error: Exception) -> Iterator[None]:
    raise error
    yield


def test_a_connection_that_breaks_is_a_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "NEWS_SECONDS", 0)
    with pytest.raises(LostWorkerError, match="ConnectionResetError"):
        next_of_workers(raises(ConnectionResetError(104, "reset")))
    with pytest.raises(KeyError, match="else"):
        next_of_workers(raises(KeyError("something else")))
    with pytest.raises(ConnectionResetError), lost_workers_explained():
        raise ConnectionResetError
    with pytest.raises(RuntimeError, match="something else"), lost_workers_explained():
        raise RuntimeError("something else")


def test_an_error_of_a_dataset_does_not_hold_the_loader() -> None:
    """Or garbage would be collected for five seconds a worker."""
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError):
            exhaust(Raising(RuntimeError("of the dataset")))
        assert not [one for one in gc.get_objects() if type(one).__name__ == "_MultiProcessingDataLoaderIter"]
    finally:
        gc.enable()


@pytest.mark.parametrize("number", [0, 1])
def test_a_folder_that_vanishes(tmp_path: Path, number: int) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(i)))
    folder = ImageFolder(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UnreadableDatasetError) as caught:
        exhaust(folder, DataConfig(augmentation=CONFIG.augmentation, num_workers=number))
    assert str(caught.value).startswith("tried 6 of 6 images, and none can be read; cannot read image '")
    assert str(caught.value).endswith(".png': No such file or directory")


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without these images it would be another dataset."""
    (tmp_path / "private").mkdir()
    (tmp_path / "0.png").write_bytes(encode(noise(0)))
    scandir = os.scandir

    def refuses(path: str) -> object:
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(PermissionError, match=r"folder '.*/private' under root cannot be listed: Permission denied"):
        ImageFolder(tmp_path)


def test_many_unreadable_images_are_few_warnings(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(i)) if i % 2 else b"")
    config = DataConfig(augmentation=CONFIG.augmentation, num_workers=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = batches(ImageFolder(tmp_path), config, batch_size=1, patch_size=4, seed=0)
        for _ in range(100):
            next(stream)
    counts = [int(str(one.message).split("images, ")[1].split(" of ")[0]) for one in caught]
    assert all(one.category is UnreadableImageWarning for one in caught)
    assert counts[0] <= 4
    assert all(1.1 * before < after for before, after in itertools.pairwise(counts))
    assert counts[-1] > 50 / 1.3
