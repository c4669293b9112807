"""Metrics: means over an interval, the first bad step by name, and files without doubles after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dinov2.train.metrics import MetricsWriter, NonFiniteError, StepScalars, read_metrics


def gathered(*rows: dict[str, float]) -> StepScalars:
    scalars = StepScalars()
    for row in rows:
        scalars.append({name: torch.tensor(value) for name, value in row.items()})
    return scalars


def test_means() -> None:
    assert gathered({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}).means() == {"a": 2.0, "b": 2.0}


def test_the_first_bad_step_and_its_terms_are_named() -> None:
    fine, bad, worse = {"a": 1.0, "b": 1.0, "total": 2.0}, {"a": 1.0, "b": float("inf")}, {"a": float("nan"), "b": 1.0}
    scalars = gathered(fine, bad | {"total": float("inf")}, worse | {"total": float("nan")}, fine)
    with pytest.raises(NonFiniteError, match=r"in step 8 b is inf; the last good checkpoint is runs/step_6") as caught:
        scalars.check_finite(10, lambda: Path("runs/step_6"))
    assert "total" not in str(caught.value)


def test_a_bad_sum_of_fine_terms_is_named() -> None:
    with pytest.raises(NonFiniteError, match="in step 1 total is nan; no checkpoint was written yet"):
        gathered({"a": 1.0, "total": float("nan")}).check_finite(1, lambda: None)


def test_state_continues_an_interval() -> None:
    first, whole = gathered({"a": 1.0}), gathered({"a": 1.0}, {"a": 2.0})
    second = StepScalars()
    second.load_state_dict(first.state_dict())
    second.append({"a": torch.tensor(2.0)})
    assert second.means() == whole.means()


def test_state_of_an_empty_interval() -> None:
    scalars = StepScalars()
    scalars.load_state_dict(StepScalars().state_dict())
    scalars.append({"a": torch.tensor(2.0)})
    assert scalars.means() == {"a": 2.0}


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"a": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5}]
    writer.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_resume_drops_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "a": step}) + "\n" for step in range(6)) + '{"step": 6, "a"')
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"a": -4})
    writer.close()
    assert [line["a"] for line in read_metrics(path)] == [0, 1, 2, 3, -4]


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1}\n')
    MetricsWriter(tmp_path, 0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_has_no_doubles_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (3, 2.0)):
        writer = MetricsWriter(tmp_path, start)
        for step in range(start + 1, 6):
            writer.write(step, {"a": value})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("a")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
