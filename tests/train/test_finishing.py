"""Runs whose crops are finished where the networks are: on a GPU the default, here on the CPU."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from dinov2.train import Interrupted, PretrainConfig, loop, pretrain, read_metrics
from tests.train.test_resume import StopsAt, assert_same_run


@pytest.fixture
def finished_by_the_device(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that were asked whether they finish crops; all do."""
    asked: list[torch.device] = []

    def finishes(device: torch.device) -> bool:
        asked.append(device)
        return True

    monkeypatch.setattr(loop, "finishes_crops", finishes)
    return asked


def with_workers(config: PretrainConfig, num_workers: int) -> PretrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=num_workers))


def test_a_stopped_run_goes_on_exactly_with_any_number_of_workers(
    config: PretrainConfig, finished_by_the_device: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uninterrupted = pretrain(dataclasses.replace(config, output=tmp_path / "uninterrupted"))
    with monkeypatch.context() as patched:
        StopsAt(5, signal.SIGTERM, patched)
        with pytest.raises(Interrupted, match="stopped after step 5 of 8"):
            pretrain(with_workers(config, 2))
    assert_same_run(uninterrupted, pretrain(with_workers(config, 1), resume=True))
    assert finished_by_the_device == [torch.device("cpu")] * 3


def test_workers_and_device_train_alike(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One operator finishes the crops either way; on one device its results are the same bits."""
    config = dataclasses.replace(config, steps=2)
    workers = pretrain(dataclasses.replace(config, output=tmp_path / "workers"))
    monkeypatch.setattr(loop, "finishes_crops", lambda device: True)
    device = pretrain(with_workers(config, 1))
    totals = [[line["total"] for line in read_metrics(run / "metrics.jsonl")] for run in (workers, device)]
    assert len(totals[0]) == 2
    assert totals[0] == totals[1]
