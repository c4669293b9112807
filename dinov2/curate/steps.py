"""The parts of curation: tasks that write one shard each, steps of such tasks, and generators of steps.

A stage is a generator that yields its steps in order. The runner finishes a step before it asks for the next, so a
stage can read what its earlier steps wrote. The generator's value is the result of the stage::

    def dedup(pool: Pool, config: DedupConfig, output: str) -> Steps[Pool]:
        neighbours = Step(output, "dedup-neighbours", config.search, inputs=(pool.features,), tasks=...)
        yield neighbours
        ...
        return pool.after(decisions.folder)

A step owns a folder whose name carries a digest of everything that its results depend on. Its files are never
rewritten. A task is done when its counts are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from dinov2.configuration import to_json
from dinov2.curate.lending import Lending
from dinov2.data.remarks import kept_remarks
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

COUNTS = ".json"
"""Suffix of the file that a task writes last."""

PARTIAL = ".partial"

ABOUT = "about"
"""Folder within a step's folder, for people and reports: it explains the name and holds times, but no results."""

NAME = re.compile(r"[\w-]+", re.ASCII)

Result = TypeVar("Result")
Steps = Generator["Step", None, Result]


@dataclass(frozen=True)
class Counts:
    """The counts of a task, a step or a stage.

    Attributes:
        rows_in: rows that were looked at.
        rows_out: rows that were kept.
        dropped: rows that were dropped, by reason.
        figures: other numbers for the report, by name; those of several tasks are added up.
    """

    rows_in: int = 0
    rows_out: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows_in + other.rows_in,
            self.rows_out + other.rows_out,
            _sums(self.dropped, other.dropped),
            _sums(self.figures, other.figures),
        )


@dataclass(frozen=True)
class Task:
    """The making of one shard.

    Attributes:
        shard: name of the shard.
        function: called with an :class:`Output` and ``arguments``; a function of a module, so that other processes can
            import it. It depends only on its arguments and the files that they name, and runs on one thread.
        arguments: small and picklable values: paths and settings, never images or vectors.
        rows: number of the rows that the task works on, for the progress bar; 0 if it is not known beforehand.
        content: called with ``arguments``; gives a digest of the rows that the result depends on, or None if they
            cannot be told. With it, a result is lent to other folders of the step (:mod:`dinov2.curate.lending`). Such
            a result depends on nothing but these rows and the step's settings, and does not name its shard.
    """

    shard: str
    function: Callable[..., Counts]
    arguments: tuple[Any, ...] = ()
    rows: int = 0
    content: Callable[..., str | None] | None = None

    @property
    def weight(self) -> int:
        """The task's part of the progress bar: its rows, or 1 if they are not known."""
        return max(self.rows, 1)


@dataclass(frozen=True)
class Step:
    """Tasks that may run in any order, on any machine that sees the storage.

    Attributes:
        output: folder or URL of the whole curation.
        name: name of the stage and of the step in it, joined by a hyphen.
        settings: a dataclass or JSON value with everything that results depend on, except the rows of their own shard.
        inputs: folders that are read, and digests of what else is. If a result depends on all their shards,
            ``settings`` names the shards.
        tasks: one task for each shard.
        unit: what a row is, in the plural.
        gpu: whether a task wants a GPU if there is one.
        version: raised when the step's code changes its results, so that old results are not taken for new ones.
        note: a line for people about a choice that was made for them; the terminal and the report show it.
    """

    output: str
    name: str
    settings: Any
    inputs: tuple[str, ...]
    tasks: Sequence[Task]
    unit: str = "images"
    gpu: bool = False
    version: int = 1
    note: str = ""

    @property
    def folder(self) -> str:
        """Folder of the results, ``OUTPUT/NAME-DIGEST``. The digest takes inputs within the output by their name."""
        return f"{self.output}/{self._named(self.inputs)}"

    @property
    def kind(self) -> str:
        """What the folders of this step have in common, whatever they read: its name and a digest of its settings."""
        return self._named(())

    def _named(self, inputs: Iterable[str]) -> str:
        inputs = [folder.removeprefix(f"{self.output}/") for folder in inputs]
        version = [self.version] if self.version > 1 else []
        return f"{self.name}-{digest([to_json(self.settings), inputs, *version])}"

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return self.name.partition("-")[0]

    def finished(self) -> set[str]:
        """The names of the shards that are done."""
        return set(Storage(self.folder).files("", COUNTS))

    def counts(self) -> Counts:
        """The sum over all shards that are done."""
        return sum((read_counts(self.folder, name) for name in sorted(self.finished())), Counts())

    def timing(self) -> Timing:
        """The time that the step took, over all runs that ended normally."""
        storage, total = Storage(self.folder), Timing(0, 0.0)
        for name, path in storage.files(ABOUT, COUNTS).items():
            if name.startswith("part-"):
                part = json.loads(storage.filesystem.cat_file(path))
                total = Timing(total.shards + part["shards"], total.seconds + part["seconds"])
        return total


class Timing(NamedTuple):
    """The number of shards made and the seconds they took, summed over processes that shared the work."""

    shards: int
    seconds: float


def read_counts(folder: str, shard: str) -> Counts:
    """The counts of a task that is done."""
    storage = Storage(folder)
    return Counts(**json.loads(storage.filesystem.cat_file(f"{storage.root}/{shard}{COUNTS}")))


Report = Callable[[int], None]
"""Is called with the number of rows of a task that are done."""


class Output:
    """Where a task writes: files ``FOLDER/SHARD.SUFFIX``. Each file appears as a whole or not at all.

    Attributes:
        folder: folder of the step.
        shard: shard of the task.
    """

    def __init__(self, folder: str, shard: str, report: Report | None = None) -> None:
        self.folder = folder
        self.shard = shard
        self._storage = Storage(folder)
        self._report, self._rows = report, 0

    def advance(self, rows: int = 1) -> None:
        """Say that more rows are done, for the progress bar."""
        self._rows += rows
        if self._report is not None:
            self._report(self._rows)

    @contextmanager
    def replace(self, suffix: str) -> Iterator[IO[bytes]]:
        """Write a file of the shard; ``suffix`` begins with a dot."""
        with self._storage.replace(f"{self._storage.root}/{self.shard}{suffix}") as file:
            yield file

    def write_table(self, columns: Any) -> None:
        """Write ``SHARD.parquet`` from a table of pyarrow, or from arrays by the name of their column."""
        arrow = require("pyarrow", extra="curate", purpose="curation")
        parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
        table = columns if isinstance(columns, arrow.Table) else arrow.table(columns)
        with self.replace(".parquet") as file:
            parquet.write_table(table, file)

    def write_array(self, array: npt.NDArray[Any]) -> None:
        """Write ``SHARD.npy``."""
        with self.replace(".npy") as file:
            np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)

    def finish(self, counts: Counts) -> None:
        """Write the counts, which mark the shard as done."""
        with self.replace(COUNTS) as file:
            file.write(json.dumps(dataclasses.asdict(counts), indent=1, sort_keys=True).encode())

    def clear(self) -> None:
        """Delete the half-written files of a killed task, tars and their indices included."""
        for folder in ("", "images", "index"):
            for path in self._storage.files(folder, PARTIAL).values():
                if path.rpartition("/")[2].startswith(f"{self.shard}."):
                    self._storage.filesystem.rm(path)


def run_task(folder: str, task: Task, kind: str = "", report: Report | None = None) -> None:
    """Make one shard, and report the rows that are done, or take the shard from another folder of the same kind of
    step. Every engine calls this function.

    Remarks on images are not shown: the stages that judge images keep them in their tables.
    """
    output = Output(folder, task.shard, report)
    output.clear()
    content = task.content(*task.arguments) if task.content and kind else None
    lending = Lending(folder, task.shard, COUNTS, f"{ABOUT}/{kind}-{content}.json") if content else None
    if lending and lending.borrow():
        return
    with warnings.catch_warnings(), kept_remarks():  # what earlier tasks of this process heard is heard again
        counts = task.function(output, *task.arguments)
    if lending:
        lending.write()
    output.finish(counts)


def check_names(argument: str, names: Iterable[str]) -> None:
    """Raise a ValueError unless the names can be parts of the names of steps, and so of folders."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"{argument}: expected names of letters, digits, '_' and '-', got {name!r}")


def digest(value: Any, digits: int = 10) -> str:
    """Hexadecimal digits that identify a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _sums(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in sorted({*first, *second})}
