"""Killed at random moments, again and again, a run loses no checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import ParallelConfig, PretrainConfig, pretrain
from dinov2.train.saving import CheckpointDirectory
from tests.train.lives import Fate, checkpoints, ends, start, with_small_images
from tests.train.same_run import assert_same_run


@pytest.fixture
def load() -> Iterator[None]:
    """Another process that wants the processor all the time."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    busy.kill()
    busy.wait()


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize(("world_size", "kills"), [(1, 6), (2, 3)])
def test_killed_again_and_again(config: PretrainConfig, tmp_path: Path, world_size: int, kills: int) -> None:
    config = dataclasses.replace(
        with_small_images(config, tmp_path / "images"),
        steps=4 * kills + 1,  # a life ends at most four steps after the checkpoint that it began with
        checkpoint_every=1,
        keep_checkpoints=2,
        parallel=ParallelConfig(sharding="full"),
    )
    whole = dataclasses.replace(config, output=tmp_path / "whole")
    assert ends(start(whole, *[None] * world_size)) == [0] * world_size

    chance = random.Random(world_size)
    directory = CheckpointDirectory(config.output / "checkpoints", keep=2)
    last = 0
    for life in range(kills):
        victims = chance.choice([[0], [1], [0, 1]]) if world_size == 2 else [0]
        fate = Fate(life % 3, chance.uniform(0, 0.1))
        codes = ends(start(config, *(fate if rank in victims else None for rank in range(world_size))))
        assert -signal.SIGKILL in codes
        assert 0 not in codes
        if newest := directory.latest():
            step = load_checkpoint(newest)["step"]
            assert step >= last
            last = step
    assert last > 0
    assert ends(start(config, *[None] * world_size)) == [0] * world_size
    assert_same_run(whole.output, config.output)
    assert checkpoints(config) == [f"step_{step:08d}" for step in (config.steps - 1, config.steps)]


@dataclasses.dataclass(frozen=True)
class DiesBefore:
    """SIGKILL instead of the ``number``-th of the calls by which the checkpoint of step 6 comes to last."""

    number: int

    def __call__(self) -> None:
        begin, calls = CheckpointDirectory.begin, []

        def counted(function):
            def patched(*arguments):
                calls.append(function)
                if len(calls) == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return patched

        def begins(directory, step):
            begin(directory, step)
            if step == 6:
                os.fsync, Path.rename, shutil.rmtree = map(counted, (os.fsync, Path.rename, shutil.rmtree))

        CheckpointDirectory.begin = begins


BEFORE, WRITTEN, REPLACED = (
    ["step_00000003", "step_00000006.partial"],
    ["step_00000003", "step_00000006"],
    ["step_00000003.partial", "step_00000006"],
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and the run on them that nothing interrupts."""
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize(
    ("number", "left"),
    [
        (1, BEFORE),  # the shard is not yet on the disk
        (3, BEFORE),  # PyTorch's metadata have no name
        (4, BEFORE),  # the manifest is not yet on the disk
        (6, BEFORE),  # all is there but the name
        (7, WRITTEN),
        (9, REPLACED),  # the checkpoint before it is not yet deleted
    ],
)
def test_killed_in_mid_save(config: PretrainConfig, shared: Path, number: int, left: list[str]) -> None:
    config, whole = dataclasses.replace(config, keep_checkpoints=1), shared / "whole"
    if not whole.exists():
        pretrain(dataclasses.replace(with_small_images(config, shared / "images"), output=whole))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=shared / "images"))
    assert ends(start(config, DiesBefore(number))) == [-signal.SIGKILL]
    assert checkpoints(config) == left
    assert_same_run(whole, pretrain(config, resume=True))
    assert checkpoints(config) == ["step_00000008"]
