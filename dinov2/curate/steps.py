"""What curation is made of: tasks that write one shard each, steps of such tasks, and generators of steps.

A stage is a generator that yields its steps in order. Whoever runs it finishes a step before asking for the next, so a
stage may look at what its earlier steps wrote. The generator's value is what the stage is for::

    def dedup(pool: Pool, config: DedupConfig, output: str) -> Steps[Pool]:
        neighbours = Step(output, "dedup-neighbours", config.search, inputs=(pool.features,), tasks=...)
        yield neighbours
        ...
        return pool.after(decisions.folder)

A step owns a folder whose name carries a digest of all that its results depend on. What is in it is never rewritten: a
task whose counts are there is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from dinov2.configuration import to_json
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

COUNTS = ".json"
"""Suffix of the file that a task writes last."""

PARTIAL = ".partial"

ABOUT = "about"
"""Folder within a step's, for people and reports: what its name stands for, and how long it took; no result."""

Result = TypeVar("Result")
Steps = Generator["Step", None, Result]


@dataclass(frozen=True)
class Counts:
    """What became of the rows of a task, a step or a stage.

    Attributes:
        rows_in: rows that it looked at.
        rows_out: rows that go on.
        dropped: the others, by reason.
        figures: other numbers worth a line in a report, by name; those of several tasks are added up.
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
        shard: its name.
        function: called with an :class:`Output` and ``arguments``; of a module, so that other processes can import it.
            It depends on nothing but its arguments and the files they name, and runs on one thread.
        arguments: small and picklable: paths and settings, never images or vectors.
    """

    shard: str
    function: Callable[..., Counts]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Step:
    """Tasks that may run in any order, on any machine that sees the storage.

    Attributes:
        output: folder or URL of the whole curation.
        name: of the stage and of the step in it, joined by a hyphen.
        settings: a dataclass or what JSON can hold: all that results depend on, other than the rows of their own shard.
        inputs: folders that are read. Where a result depends on all their shards, ``settings`` names these.
        tasks: one for each shard.
        unit: what a row is, in the plural.
        gpu: whether a task wants a GPU where there is one.
    """

    output: str
    name: str
    settings: Any
    inputs: tuple[str, ...]
    tasks: Sequence[Task]
    unit: str = "images"
    gpu: bool = False

    @property
    def folder(self) -> str:
        """Where the results lie, ``OUTPUT/NAME-DIGEST``; a folder within the output counts by its name."""
        inputs = [folder.removeprefix(f"{self.output}/") for folder in self.inputs]
        return f"{self.output}/{self.name}-{digest([to_json(self.settings), inputs])}"

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.name.partition("-")[0]

    def finished(self) -> set[str]:
        """Names of the shards that are done."""
        return set(Storage(self.folder).files("", COUNTS))

    def counts(self) -> Counts:
        """The sum over all shards that are done."""
        storage, total = Storage(self.folder), Counts()
        for path in storage.files("", COUNTS).values():
            total += Counts(**json.loads(storage.filesystem.cat_file(path)))
        return total

    def timing(self) -> Timing:
        """How long it took, over all runs that came to their end."""
        storage, total = Storage(self.folder), Timing(0, 0.0)
        for name, path in storage.files(ABOUT, COUNTS).items():
            if name.startswith("part-"):
                part = json.loads(storage.filesystem.cat_file(path))
                total = Timing(total.shards + part["shards"], total.seconds + part["seconds"])
        return total


class Timing(NamedTuple):
    """Shards that were made, and the seconds that it took, added up over processes that shared the work."""

    shards: int
    seconds: float


class Output:
    """Where a task writes: files ``FOLDER/SHARD.SUFFIX``, each of which is there as a whole or not at all.

    Attributes:
        folder: the step's.
        shard: the task's.
    """

    def __init__(self, folder: str, shard: str) -> None:
        self.folder = folder
        self.shard = shard
        self._storage = Storage(folder)

    @contextmanager
    def replace(self, suffix: str) -> Iterator[IO[bytes]]:
        """Write a file of the shard; ``suffix`` begins with a dot."""
        with self._storage.replace(f"{self._storage.root}/{self.shard}{suffix}") as file:
            yield file

    def write_table(self, columns: Any) -> None:
        """Write ``SHARD.parquet``: a table of pyarrow, or arrays by the name of their column."""
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
        """Write the counts, which says that the shard is done."""
        with self.replace(COUNTS) as file:
            file.write(json.dumps(dataclasses.asdict(counts), indent=1, sort_keys=True).encode())

    def clear(self) -> None:
        """Delete what a task that was killed has left half-written: here, or of tars and their indices."""
        for folder in ("", "images", "index"):
            for path in self._storage.files(folder, PARTIAL).values():
                if path.rpartition("/")[2].startswith(f"{self.shard}."):
                    self._storage.filesystem.rm(path)


def run_task(folder: str, task: Task) -> None:
    """Make one shard; what any engine calls, anywhere."""
    output = Output(folder, task.shard)
    output.clear()
    output.finish(task.function(output, *task.arguments))


def digest(value: Any) -> str:
    """Ten hexadecimal digits that stand for a value of JSON's types."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _sums(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in sorted({*first, *second})}
