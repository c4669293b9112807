"""What fails around a run ends it with one clear message, and the last checkpoint is whole."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.data import LostWorkerError, ShardImage, write_shards
from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import CheckpointError, ParallelConfig, PretrainConfig, pretrain, read_metrics
from dinov2.train.metrics import MetricsWriter
from dinov2.train.saving import CheckpointDirectory, Stager
from dinov2.train.trainer import Trainer
from tests.train.lives import checkpoints, ends, error, start, with_small_images


def after_the_first_checkpoint(monkeypatch: pytest.MonkeyPatch, config: PretrainConfig, action) -> None:
    """Do something once, when step 5 begins and the checkpoint of step 3 is complete."""
    step = Trainer.step

    def patched(trainer, index, micro_batches):
        if index == 4:
            while checkpoints(config) != ["step_00000003"]:
                time.sleep(0.01)
            action()
        return step(trainer, index, micro_batches)

    monkeypatch.setattr(Trainer, "step", patched)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Undoes what :func:`limit_files` does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def limit_files() -> None:
    """From now on no file may grow beyond 60 kB: the operating system fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def intact(config: PretrainConfig, step: int) -> bool:
    name = f"step_{step:08d}"
    return checkpoints(config) == [name] and load_checkpoint(config.output / "checkpoints" / name)["step"] == step


@pytest.mark.usefixtures("small_files")
def test_a_full_disk(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    after_the_first_checkpoint(monkeypatch, config, limit_files)
    saying = r"^saving checkpoint .*step_00000006 failed: .* File too large; the last good checkpoint is .*_00000003$"
    with pytest.raises(CheckpointError, match=saying):
        pretrain(config)
    assert intact(config, 3)
    assert len(read_metrics(config.output / "metrics.jsonl")) >= 6


def test_no_room_for_metrics(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MetricsWriter.write

    def full(writer: MetricsWriter, step: int, values: dict) -> None:
        if step == 5:
            writer._file = io.TextIOWrapper(io.FileIO("/dev/full", "w"))
        write(writer, step, values)

    monkeypatch.setattr(MetricsWriter, "write", full)
    with pytest.raises(OSError, match=r"metrics of step 5 cannot be written to .*No space left.*--resume"):
        pretrain(config)
    assert intact(config, 3)


def fail_to_write() -> None:
    """The disk of this process is full when the second checkpoint comes."""
    write, calls = Stager.write, []

    def patched(stager, directory):
        calls.append(directory)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(stager, directory)

    Stager.write = patched


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_of_two(config: PretrainConfig, tmp_path: Path, rank: int) -> None:
    config = with_small_images(config, tmp_path / "images")
    before = [None, fail_to_write] if rank == 1 else [fail_to_write, None]
    assert ends(start(config, *before)) == [1, 1]
    saying = r"saving checkpoint .*step_00000006 failed: \[Errno 28\] No space left on device; .*step_00000003$"
    assert re.match("CheckpointError: " + saying, error(config, rank))
    assert re.match(f"PeerError: process {rank} failed: " + saying, error(config, 1 - rank))
    assert intact(config, 3)


@dataclasses.dataclass(frozen=True)
class HangsOnceSaved:
    """The process stands still at the first step that begins with a complete checkpoint."""

    config: PretrainConfig

    def __call__(self) -> None:
        step, directory = Trainer.step, CheckpointDirectory(self.config.output / "checkpoints", keep=1)

        def patched(trainer, index, micro_batches):
            if directory.all():
                os.kill(os.getpid(), signal.SIGSTOP)
            return step(trainer, index, micro_batches)

        Trainer.step = patched


def test_a_hung_process(config: PretrainConfig, tmp_path: Path) -> None:
    parallel = ParallelConfig(timeout_seconds=4)
    config = dataclasses.replace(with_small_images(config, tmp_path / "images"), steps=500, parallel=parallel)
    waiting, hung = start(config, None, HangsOnceSaved(config))
    assert ends([waiting]) == [1]
    hung.kill()
    assert ends([hung]) == [-signal.SIGKILL]
    saying = r"PeerError: process 0 of 2 lost another one, .* did not answer within parallel\.timeout_seconds"
    assert re.match(saying, error(config, 0))
    for name in checkpoints(config):  # nothing else is there
        load_checkpoint(config.output / "checkpoints" / name)


def test_a_killed_worker(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, steps=500, data=dataclasses.replace(config.data, num_workers=2))

    def kill_worker() -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    after_the_first_checkpoint(monkeypatch, config, kill_worker)
    with pytest.raises(LostWorkerError, match=r"lost a process that prepares batches"):
        pretrain(config)
    assert checkpoints(config)[0] == "step_00000003"
    assert not any(name.endswith("partial") for name in checkpoints(config))


def test_a_missing_shard(config: PretrainConfig, tmp_path: Path) -> None:
    with_small_images(config, tmp_path / "images")
    files = sorted((tmp_path / "images").iterdir())
    write_shards((ShardImage(file.stem, file.read_bytes(), {}) for file in files), tmp_path / "pool", shard_size=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=tmp_path / "pool"), steps=3)
    pretrain(config)
    (tmp_path / "pool" / "images" / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"got .*pool.*, which lacks 1 of 3 tars: 00001\.tar"):
        pretrain(dataclasses.replace(config, steps=5), resume=True)
    assert intact(config, 3)
