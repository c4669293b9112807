"""Runs that end in the middle: processes forked from one that has imported everything, so that many are cheap."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2.train import PretrainConfig, pretrain
from dinov2.train.trainer import Trainer
from tests.forkserver import CONTEXT


def with_small_images(config: PretrainConfig, folder: Path) -> PretrainConfig:
    """The run on a few images that are read and cropped in no time."""
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=folder))


@dataclass(frozen=True)
class Fate:
    """What happens to a process after ``steps`` steps of its own: ``number`` is sent to it ``delay`` seconds later.

    It goes no further than two steps on, however long the signal takes.
    """

    steps: int
    delay: float = 0.0
    number: int = signal.SIGKILL

    def __call__(self) -> None:
        step, done = Trainer.step, []

        def patched(trainer, index, micro_batches):
            if len(done) == self.steps:
                threading.Timer(self.delay, os.kill, (os.getpid(), self.number)).start()
            if len(done) == self.steps + 2:
                time.sleep(600)
            done.append(index)
            return step(trainer, index, micro_batches)

        Trainer.step = patched


def live(config: PretrainConfig, before: Callable[[], object] | None, environment: dict[str, str]) -> None:
    """Start the run, or go on with it; what ends it is written beside the run directory."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    log = config.output.with_suffix(f".error{environment.get('RANK', '')}")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            if before is not None:
                before()
            pretrain(config, resume=True)
        except BaseException as error:
            log.write_text(f"{type(error).__name__}: {error}")
            raise SystemExit(1) from None


def start(config: PretrainConfig, *before: Callable[[], object] | None) -> list[BaseProcess]:
    """One process for each ``before``, which it calls first; several as torchrun starts them."""
    environments = list(torchrun_environments(len(before))) if len(before) > 1 else [{}]
    processes = [
        CONTEXT.Process(target=live, args=(config, action, environment))
        for action, environment in zip(before, environments, strict=True)
    ]
    for process in processes:
        process.start()
    return processes


def torchrun_environments(number: int) -> Iterator[dict[str, str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    for rank in range(number):
        yield {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }


def ends(processes: list[BaseProcess]) -> list[int | None]:
    """Wait for all, and say how each ended; one that does not is aborted."""
    for process in processes:
        process.join(120)
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join()
    return [process.exitcode for process in processes]


def error(config: PretrainConfig, rank: int | str = "") -> str:
    """What the process wrote before it left."""
    return config.output.with_suffix(f".error{rank}").read_text()


def checkpoints(config: PretrainConfig) -> list[str]:
    """Names of everything among the checkpoints."""
    directory: Path = config.output / "checkpoints"
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
