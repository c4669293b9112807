"""Whether two runs are the same, bit by bit."""

from __future__ import annotations

from pathlib import Path

import torch

from dinov2.models.checkpoints.run import load_checkpoint
from dinov2.train import read_metrics
from dinov2.train.saving import CheckpointDirectory

EXACT = ("total", "dino_local", "dino_global", "koleo", "ibot", "grad_norm/backbone", "target_entropy", "lr")


def losses(output: Path) -> list[dict[str, float]]:
    """Lines of metrics without what depends on the clock; floats survive JSON exactly."""
    return [{name: line[name] for name in ("step", *EXACT)} for line in read_metrics(output / "metrics.jsonl")]


def assert_same_run(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    states = [load_checkpoint(path) for path in (last(first), last(second))]
    assert states[0]["step"] == states[1]["step"]
    for part in ("student", "teacher", "objective"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), f"{part}.{name}"
    assert states[0]["optimizer"].keys() == states[1]["optimizer"].keys()
    for parameter, moments in states[0]["optimizer"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, states[1]["optimizer"][parameter][name]), f"optimizer {parameter} {name}"


def last(output: Path) -> Path:
    path = CheckpointDirectory(output / "checkpoints", keep=1).latest()
    assert path is not None
    return path
