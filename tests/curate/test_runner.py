"""Steps are run to their end, whatever becomes of processes; what is done is not done again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2.curate.engines import Engine, Inline, ProcessPool
from dinov2.curate.pool import read_table
from dinov2.curate.runner import FailedShardsError, run_steps
from dinov2.curate.steps import Counts, Step, Steps, Task
from tests.curate import jobs


def stage(tmp_path: Path, *tasks: Task) -> Steps[Counts]:
    step = Step(str(tmp_path), "test-squares", {"power": 2}, (), tasks)
    yield step
    return step.counts()


@pytest.mark.parametrize("engine", [Inline(), ProcessPool(2)], ids=["inline", "processes"])
def test_all_shards_are_made(tmp_path: Path, engine: Engine) -> None:
    tasks = [Task(f"{number:05d}", jobs.square, (number,)) for number in range(5)]
    assert run_steps(stage(tmp_path, *tasks), engine) == Counts(5, 5)
    (folder,) = tmp_path.iterdir()
    assert [read_table(str(folder), task.shard)["square"].to_pylist() for task in tasks] == [[0], [1], [4], [9], [16]]


def test_a_killed_process_costs_nothing_but_time(tmp_path: Path) -> None:
    tasks = [Task(f"{number:05d}", jobs.square, (number,)) for number in range(4)]
    tasks[1] = Task("00001", jobs.killed_once, (1, str(tmp_path / "marker")))
    assert run_steps(stage(tmp_path / "out", *tasks), ProcessPool(2)) == Counts(4, 4)


def test_what_fails_is_tried_again_and_named(tmp_path: Path) -> None:
    tasks = [Task("00000", jobs.square, (0,)), Task("00001", jobs.failing), Task("00002", jobs.always_killed)]
    with pytest.raises(FailedShardsError, match=r"2 of 3 shards of test-squares failed 3 times.*\n.*00001.*no luck"):
        run_steps(stage(tmp_path, *tasks), ProcessPool(2))
    assert {path.stem for path in tmp_path.glob("test-squares-*/*.json")} == {"00000"}
