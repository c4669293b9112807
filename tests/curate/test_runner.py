"""Steps are run to their end, whatever becomes of processes; what is done is not done again."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dinov2.curate.engines import Engine, Inline, LostTaskError, ProcessPool, RayCluster
from dinov2.curate.runner import FailedShardsError, Part, Watcher, run_steps
from dinov2.curate.steps import ABOUT, Counts, Step, Steps, Task
from tests.curate import jobs


def stage(tmp_path: Path, *tasks: Task) -> Steps[Counts]:
    step = Step(str(tmp_path), "test-squares", {"power": 2}, (), tasks)
    yield step
    return step.counts()


@pytest.fixture(params=["inline", "processes"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """The engines of this machine."""
    return {"inline": Inline(), "processes": ProcessPool(2)}[request.param]


def squares(count: int) -> list[Task]:
    return [Task(f"{number:05d}", jobs.square, (number,)) for number in range(count)]


def contents(root: Path) -> dict[str, bytes]:
    """Every result under a root."""
    files = [path for path in root.rglob("*") if path.is_file() and path.parent.name != ABOUT]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_all_engines_write_the_same_bytes(tmp_path: Path, engine: Engine) -> None:
    assert run_steps(stage(tmp_path / "this", *squares(5)), engine) == Counts(5, 5)
    run_steps(stage(tmp_path / "inline", *squares(5)), Inline())
    assert contents(tmp_path / "this") == contents(tmp_path / "inline")
    assert len(contents(tmp_path / "this")) == 10


def check_killed_process(tmp_path: Path, engine: Engine) -> None:
    """A killed process costs nothing but time."""
    tasks = squares(4)
    tasks[1] = Task("00001", jobs.killed_once, (1, str(tmp_path / "marker")))
    watcher = Recorder()
    assert run_steps(stage(tmp_path / "out", *tasks), engine, watcher=watcher) == Counts(4, 4)
    assert ("00001", LostTaskError) in watcher.retried


def check_failures(tmp_path: Path, engine: Engine) -> None:
    """What fails is tried again, and named."""
    tasks = [Task("00000", jobs.square, (0,)), Task("00001", jobs.failing), Task("00002", jobs.always_killed)]
    with pytest.raises(FailedShardsError, match=r"2 of 3 shards of test-squares failed 2 times.*\n.*00001.*no luck"):
        run_steps(stage(tmp_path, *tasks), engine, tries=2)
    assert {path.stem for path in tmp_path.glob("test-squares-*/*.json")} == {"00000"}


def test_killed_processes_and_failures(tmp_path: Path) -> None:
    check_killed_process(tmp_path / "killed", ProcessPool(2))
    check_failures(tmp_path / "failed", ProcessPool(2))


def test_a_process_that_was_lost_between_two_steps(tmp_path: Path) -> None:
    engine = ProcessPool(2)
    run_steps(stage(tmp_path / "one", *squares(3)), engine)
    assert engine._executor is not None
    for process in list(engine._executor._processes.values()):
        process.kill()
        process.join()
    assert run_steps(stage(tmp_path / "two", *squares(3)), engine) == Counts(3, 3)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_an_engine_leaves_nothing_behind(tmp_path: Path, error: type[BaseException] | None) -> None:
    """Python wakes the threads of executors when it exits, and fails where one is just ending."""

    class Interrupted(Watcher):
        def advanced(self, step: Step) -> None:
            if error is not None:
                raise error

    before = {*multiprocessing.active_children(), *threading.enumerate()}
    with contextlib.suppress(KeyboardInterrupt), ProcessPool(2) as engine:
        run_steps(stage(tmp_path, *squares(9)), engine, watcher=Interrupted())
    assert {*multiprocessing.active_children(), *threading.enumerate()} <= before
    assert run_steps(stage(tmp_path, *squares(9)), engine) == Counts(9, 9)  # it starts again
    engine.close()


def test_a_real_cluster_of_ray(tmp_path: Path) -> None:
    """All of it in one test, since a cluster takes long to start: same bytes, a killed worker, failures."""
    ray = pytest.importorskip("ray")
    engine = RayCluster(workers=2)
    try:
        assert run_steps(stage(tmp_path / "this", *squares(5)), engine) == Counts(5, 5)
        run_steps(stage(tmp_path / "inline", *squares(5)), Inline())
        assert contents(tmp_path / "this") == contents(tmp_path / "inline")
        check_killed_process(tmp_path / "killed", engine)
        check_failures(tmp_path / "failed", engine)
    finally:
        ray.shutdown()


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    run_steps(stage(tmp_path, *squares(3)), Inline())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    watcher = Recorder()
    assert run_steps(stage(tmp_path, *squares(5)), Inline(), watcher=watcher) == Counts(5, 5)
    assert watcher.made == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_a_killed_task_left_goes(tmp_path: Path) -> None:
    steps = stage(tmp_path, *squares(2))
    folder = Path(next(steps).folder)
    (folder / "images").mkdir(parents=True)
    (folder / "00001.parquet.ab.partial").write_bytes(b"half")
    (folder / "images" / "00001.tar.ab.partial").write_bytes(b"half")
    (folder / "000010.parquet.ab.partial").write_bytes(b"of another task")
    run_steps(stage(tmp_path, *squares(2)), Inline())
    assert [path.name for path in folder.rglob("*.partial")] == ["000010.parquet.ab.partial"]


def test_processes_share_the_work(tmp_path: Path) -> None:
    run_steps(stage(tmp_path / "one", *squares(5)), Inline())
    with ThreadPoolExecutor(2) as threads:
        parts = [
            threads.submit(run_steps, stage(tmp_path / "two", *squares(5)), Inline(), part=Part(number, 2))
            for number in range(2)
        ]
    assert [part.result() for part in parts] == [Counts(5, 5)] * 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_share_that_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"2 shards of test-squares .* 00001, 00003 among them"):
        run_steps(stage(tmp_path, *squares(4)), Inline(), part=Part(0, 2), patience=0)


@pytest.mark.parametrize("part", [(2, 2), (-1, 2), (0, 0)])
def test_shares_are_checked(part: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="shard: expected i/n with 0 <= i < n"):
        Part(*part)


def test_the_name_of_a_folder_follows_what_results_depend_on() -> None:
    def folder(output: str = "out", settings: object = 1, inputs: tuple[str, ...] = ("out/a",)) -> str:
        return Step(output, "name", settings, inputs, ()).folder.rpartition("/")[2]

    assert folder() == folder("elsewhere", inputs=("elsewhere/a",))  # an output may be moved
    assert len({folder(), folder(settings=2), folder(inputs=("out/b",)), folder(inputs=("other/a",))}) == 4


class Recorder(Watcher):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.made = 0
        self.retried: list[tuple[str, type[Exception]]] = []

    def advanced(self, step: Step) -> None:
        self.made += 1

    def retrying(self, step: Step, shard: str, error: Exception) -> None:
        self.retried.append((shard, type(error)))
