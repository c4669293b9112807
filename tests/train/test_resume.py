"""A resumed run repeats the uninterrupted one bit by bit, after an end and after a signal."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import Interrupted, PretrainConfig, pretrain, read_metrics
from dinov2.train.trainer import Trainer
from tests.train.same_run import assert_same_run, last, losses


class StopsAt:
    """Sends this process a signal at the end of one step."""

    def __init__(self, step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Trainer.step

        def patched(trainer, index, micro_batches):
            scalars = original(trainer, index, micro_batches)
            if index + 1 == step:
                os.kill(os.getpid(), number)
            return scalars

        monkeypatch.setattr(Trainer, "step", patched)


@pytest.fixture
def uninterrupted(config: PretrainConfig, tmp_path: Path) -> Path:
    return pretrain(dataclasses.replace(config, output=tmp_path / "uninterrupted"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"log_every": 3},  # stopped in the middle of an interval of metrics
        {"accumulation_steps": 2},
        {"precision": "bf16"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_signal_saves_and_the_run_goes_on_exactly(
    config: PretrainConfig, changes: dict, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = dataclasses.replace(config, **changes)
    uninterrupted = pretrain(dataclasses.replace(config, output=tmp_path / "uninterrupted"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        StopsAt(5, number, patched)
        with pytest.raises(Interrupted, match=r"stopped after step 5 of 8 and saved .*step_00000005; .*--resume"):
            pretrain(config)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert_same_run(uninterrupted, pretrain(config, resume=True))


def test_any_number_of_workers_gives_the_same_run(config: PretrainConfig, uninterrupted: Path) -> None:
    parallel = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    assert_same_run(uninterrupted, pretrain(parallel))


RUN = "import pickle, sys; from dinov2.train import pretrain; pretrain(pickle.load(sys.stdin.buffer))"


def start(code: str, config: PretrainConfig) -> subprocess.Popen:
    """Run ``code`` in a process group of its own, with ``config`` on its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        start_new_session=True,
    )
    process.stdin.write(pickle.dumps(config))
    process.stdin.close()
    return process


def wait_for_steps(process: subprocess.Popen, config: PretrainConfig, steps: int) -> None:
    while process.poll() is None and len(read_metrics(config.output / "metrics.jsonl")) < steps:
        time.sleep(0.01)


def test_a_scheduler_stops_the_whole_group(config: PretrainConfig, tmp_path: Path) -> None:
    """SIGTERM reaches the workers as well; they must live until the training process has saved."""
    long = dataclasses.replace(
        config, steps=60, checkpoint_every=60, data=dataclasses.replace(config.data, num_workers=2)
    )
    process = start(RUN, long)
    wait_for_steps(process, long, 3)
    os.killpg(process.pid, signal.SIGTERM)
    assert b"Interrupted: stopped after step" in process.stderr.read()
    process.wait(timeout=60)
    assert 3 <= load_checkpoint(last(long.output))["step"] < 60


def test_killed_before_the_first_checkpoint(config: PretrainConfig, uninterrupted: Path) -> None:
    config.output.mkdir()
    (config.output / "config.json").write_text((uninterrupted / "config.json").read_text())
    (config.output / "metrics.jsonl").write_text('{"step": 1, "total": 3}\n')
    assert_same_run(uninterrupted, pretrain(config, resume=True))


def test_resume_of_nothing_starts(config: PretrainConfig, uninterrupted: Path) -> None:
    assert_same_run(uninterrupted, pretrain(config, resume=True))


def test_resume_of_a_finished_run_changes_nothing(config: PretrainConfig, uninterrupted: Path) -> None:
    before = losses(uninterrupted)
    pretrain(dataclasses.replace(config, output=uninterrupted), resume=True)
    assert losses(uninterrupted) == before


def test_a_longer_run_and_other_intervals_are_allowed(config: PretrainConfig, uninterrupted: Path) -> None:
    changed = dataclasses.replace(config, output=uninterrupted, steps=10, log_every=2, checkpoint_every=5)
    lines = losses(pretrain(changed, resume=True))
    assert [line["step"] for line in lines] == [*range(1, 9), 10]


def test_another_configuration_is_refused(config: PretrainConfig, uninterrupted: Path) -> None:
    changed = dataclasses.replace(
        config, output=uninterrupted, seed=6, optim=dataclasses.replace(config.optim, base_lr=0.5)
    )
    with pytest.raises(ValueError, match=r"optim\.base_lr: was 0\.004, now 0\.5\n  seed: was 5, now 6\n.* may change"):
        pretrain(changed, resume=True)


def test_other_images_are_refused(config: PretrainConfig, uninterrupted: Path) -> None:
    class Images:
        def __len__(self) -> int:
            return 21

        def __getitem__(self, index: int):
            raise AssertionError("never read")

    with pytest.raises(ValueError, match=r"the run was started on 20 images, but .* now holds 21"):
        pretrain(dataclasses.replace(config, output=uninterrupted), resume=True, dataset=Images())


def test_a_damaged_checkpoint_is_named(config: PretrainConfig, uninterrupted: Path) -> None:
    (last(uninterrupted) / "__0_0.distcp").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"checkpoint .*step_00000008 cannot be read"):
        pretrain(dataclasses.replace(config, output=uninterrupted), resume=True)


def test_a_field_newer_than_the_run_has_its_default_there(config: PretrainConfig, uninterrupted: Path) -> None:
    file = uninterrupted / "config.json"
    values = json.loads(file.read_text())
    del values["keep_every"], values["data"]["masks"]["same_total"]
    file.write_text(json.dumps(values))
    same = dataclasses.replace(config, output=uninterrupted)
    pretrain(same, resume=True)
    file.write_text(json.dumps(values))
    masks = dataclasses.replace(config.data.masks, same_total=True)
    with pytest.raises(ValueError, match=r"data\.masks\.same_total: was false, now true"):
        pretrain(dataclasses.replace(same, data=dataclasses.replace(same.data, masks=masks)), resume=True)
