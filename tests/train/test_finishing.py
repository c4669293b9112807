"""Runs whose crops are finished on the device: as exact as the others, and nearly the same."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from dinov2.train import Interrupted, PretrainConfig, pretrain, read_metrics
from tests.train.test_resume import StopsAt, assert_same_run


def on_device(config: PretrainConfig, **changes: object) -> PretrainConfig:
    data = dataclasses.replace(config.data, photometric="device", **changes)
    return dataclasses.replace(config, data=data)


def test_a_stopped_run_goes_on_exactly_with_any_number_of_workers(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uninterrupted = pretrain(dataclasses.replace(on_device(config), output=tmp_path / "uninterrupted"))
    with monkeypatch.context() as patched:
        StopsAt(5, signal.SIGTERM, patched)
        with pytest.raises(Interrupted, match="stopped after step 5 of 8"):
            pretrain(on_device(config, num_workers=2))
    assert_same_run(uninterrupted, pretrain(on_device(config, num_workers=1), resume=True))


def test_both_paths_train_alike_and_are_not_mixed(config: PretrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, steps=2)
    device = pretrain(on_device(config))
    workers = pretrain(dataclasses.replace(config, output=tmp_path / "workers"))
    for of_device, of_workers in zip(*(read_metrics(run / "metrics.jsonl") for run in (device, workers)), strict=True):
        assert of_device["total"] == pytest.approx(of_workers["total"], rel=0.01)  # crops differ by a level or so
        assert of_device["total"] != of_workers["total"]
    with pytest.raises(ValueError, match=r'data\.photometric: was "device", now "workers"'):
        pretrain(dataclasses.replace(config, steps=4), resume=True)
