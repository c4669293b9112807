"""Runs the steps of stages in order, each until all its shards are there, and sums up their counts."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from dinov2.configuration import to_json
from dinov2.curate.engines import Call, Engine
from dinov2.curate.steps import ABOUT, Result, Step, Steps
from dinov2.data.shards.storage import Storage

POLL_SECONDS = 1.0


class FailedShardsError(OSError):
    """Some shards of a step failed. All other shards are done, so the next run tries only the failed ones."""


@dataclass(frozen=True)
class Part:
    """The part of every step that this process does: process ``number`` of ``count`` that share the work."""

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"shard: expected i/n with 0 <= i < n, got {self.number}/{self.count}")


class Watcher:
    """Is told about the progress of a curation. This base class ignores it."""

    def started(self, step: Step, done: int) -> None:
        """A step begins. ``done`` shards of ``len(step.tasks)`` were there already."""

    def advanced(self, step: Step) -> None:
        """One more shard is there."""

    def progressed(self, step: Step, rows: int) -> None:
        """``rows`` rows are done so far, of all tasks by their :attr:`~Task.weight`; those under way count too."""

    def retrying(self, step: Step, shard: str, error: Exception) -> None:
        """A shard failed and will be tried again."""

    def waiting(self, step: Step, missing: int) -> None:
        """Other processes still have to make ``missing`` shards."""

    def ended(self, step: Step) -> None:
        """All shards of a step are there."""


ALL = Part()
SILENT = Watcher()


def run_steps(
    steps: Steps[Result],
    engine: Engine,
    *,
    tries: int = 3,
    part: Part = ALL,
    patience: float = 3600,
    watcher: Watcher = SILENT,
) -> Result:
    """Run all steps of a generator.

    Args:
        steps: steps of one stage or of a whole curation.
        engine: where tasks run.
        tries: number of tries before a shard counts as failed; the last try runs alone.
        part: share of this process, if several processes run one curation on the same storage.
        patience: seconds to wait for shards of other processes while none appears.
        watcher: is told about the progress.

    Returns:
        The generator's value.

    Raises:
        FailedShardsError: some shards of a step failed; no later step has begun.
        TimeoutError: shards of other processes did not appear.
    """
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        _run_step(step, engine, tries, part, patience, watcher)


def _run_step(step: Step, engine: Engine, tries: int, part: Part, patience: float, watcher: Watcher) -> None:
    done = step.finished()
    watcher.started(step, len(done))
    if not done:
        _describe(step)
    rows = [sum(task.weight for task in step.tasks if task.shard in done)]  # in a list, for the function below

    def report(under_way: int) -> None:
        watcher.progressed(step, rows[0] + under_way)

    report(0)
    begun = time.monotonic()
    own = [task for task in step.tasks[part.number :: part.count] if task.shard not in done]
    calls = [Call(step.folder, task, step.gpu, step.kind) for task in own]
    failures: dict[str, Exception] = {}
    for attempt in range(tries):
        failures = {}
        at_once = 1 if attempt == tries - 1 > 0 else None
        for call, error in engine.run(calls, at_once, report):
            if error is None:
                rows[0] += call.task.weight
                watcher.advanced(step)
                report(0)
                continue
            failures[call.task.shard] = error
            if attempt < tries - 1:
                watcher.retrying(step, call.task.shard, error)
        calls = [call for call in calls if call.task.shard in failures]
        if not calls:
            break
    if failures:
        raise FailedShardsError(_message(step, failures, tries))
    if own:
        _note_time(step, part, len(own), time.monotonic() - begun)
    _wait_for_others(step, patience, watcher)
    watcher.ended(step)


def _message(step: Step, failures: dict[str, Exception], tries: int) -> str:
    lines = [f"\n  {shard}: {type(error).__name__}: {error}" for shard, error in sorted(failures.items())[:10]]
    more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
    return (
        f"{len(failures)} of {len(step.tasks)} shards of {step.name} failed {tries} times; the others are done, and"
        f" the next run tries only these:{''.join(lines)}{more}"
    )


def _wait_for_others(step: Step, patience: float, watcher: Watcher) -> None:
    names = {task.shard for task in step.tasks}
    missing, since = names - step.finished(), time.monotonic()
    while missing:
        if time.monotonic() - since > patience:
            raise TimeoutError(
                f"waited {patience:.0f} seconds for {len(missing)} shards of {step.name} that other processes have to"
                f" make, {', '.join(sorted(missing)[:3])} among them: run those processes again, then this one"
            )
        watcher.waiting(step, len(missing))
        watcher.progressed(step, sum(task.weight for task in step.tasks if task.shard not in missing))
        time.sleep(POLL_SECONDS)
        now = names - step.finished()
        missing, since = now, time.monotonic() if len(now) < len(missing) else since


def _describe(step: Step) -> None:
    """Write a note into the step's folder that explains its name."""
    storage = Storage(step.folder)
    note = {"name": step.name, "settings": to_json(step.settings), "inputs": list(step.inputs), "unit": step.unit}
    with storage.replace(f"{storage.root}/{ABOUT}/step.json") as file:
        file.write(json.dumps(note, indent=1, sort_keys=True).encode())


def _note_time(step: Step, part: Part, made: int, seconds: float) -> None:
    """Write the time of this run, which :meth:`Step.timing` reads."""
    storage = Storage(step.folder)
    path = f"{storage.root}/{ABOUT}/part-{part.number}-of-{part.count}.json"
    if storage.filesystem.exists(path):
        before = json.loads(storage.filesystem.cat_file(path))
        made, seconds = made + before["shards"], seconds + before["seconds"]
    with storage.replace(path) as file:
        file.write(json.dumps({"shards": made, "seconds": seconds}).encode())


class StageSummary(NamedTuple):
    """One run of a stage.

    Attributes:
        name: name of the stage.
        unit: what a row is.
        rows_in: rows that the stage decided on.
        rows_out: rows that were kept.
        dropped: rows that were dropped, by reason.
        seconds: time of the run, the sum over processes that shared the work.
    """

    name: str
    unit: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    seconds: float


def summarize(steps: Iterable[Step]) -> list[StageSummary]:
    """Sum up stages in the order of their steps. Consecutive steps of one stage are one run of it.

    The rows out of a run are those of its last step. Dropped rows are summed over its steps with the last step's unit.
    """
    summaries = []
    for name, group in itertools.groupby(steps, key=lambda step: step.stage):
        members = list(group)
        last, dropped = members[-1], Counter[str]()
        for step in members:
            if step.unit == last.unit:
                dropped.update(step.counts().dropped)
        rows_out = last.counts().rows_out
        seconds = sum(step.timing().seconds for step in members)
        summaries.append(
            StageSummary(name, last.unit, rows_out + dropped.total(), rows_out, dict(sorted(dropped.items())), seconds)
        )
    return summaries
