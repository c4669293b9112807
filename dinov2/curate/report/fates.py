"""The table of all images of a curation and their fates, and the same of the dropped ones as CSV for people."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.materialize import LOST
from dinov2.curate.pipeline import CurateConfig
from dinov2.curate.pool import Pool, read_skipped, read_table
from dinov2.curate.report.finished import pool_of, sets_of
from dinov2.curate.screen import EXACT, NEAR
from dinov2.curate.search.vectors import read_layout
from dinov2.curate.steps import Step
from dinov2.data.files import escaped
from dinov2.data.folders import images_among
from dinov2.data.outputs import DROPPED, FATES, of_outputs
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

POOL = "pool"
KEPT, USED = "kept", "used"
REPEATS = (EXACT, NEAR)
SIDES = ("width", "height")
EXAMPLES = 5
COLUMNS = {
    "set": "string",  # pool, or evaluation_sets/NAME or seeds/NAME
    "name": "string",  # path in its folder, or URL, or SHARD/KEY
    "shard": "string",  # null if the image is in no shard
    "row": "int64",
    "width": "int32",  # as stored; null if the image is in no shard
    "height": "int32",
    "fate": "string",  # kept, or used in a set, or the stage that dropped it
    "reason": "string",  # why it was dropped
    "remark": "string",  # the decoder's or the system's words, also about kept images
    "instead": "string",  # SHARD/ROW of the image that is kept instead; for an evaluation image, SET/SHARD/ROW
}


class Cause(NamedTuple):
    """Where and why images were dropped."""

    set: str
    stage: str
    reason: str


@dataclass
class Fates:
    """A summary of the table.

    Attributes:
        kept: number of images that are still in, by set.
        dropped: number of dropped images.
        examples: names and remarks of the first dropped images.
        remarks: names and remarks of the first images that are still in although something was said about them.
        remarked: the number of these images.
    """

    kept: Counter[str] = field(default_factory=Counter)
    dropped: Counter[Cause] = field(default_factory=Counter)
    examples: dict[Cause, list[tuple[str, str]]] = field(default_factory=dict)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    remarked: int = 0

    def add(self, table: Any) -> None:
        """Count the rows of a table with :data:`COLUMNS`."""
        columns = (table[name].to_pylist() for name in ("set", "name", "fate", "reason", "remark"))
        for of_set, name, fate, reason, remark in zip(*columns, strict=True):
            if reason is None:
                self.kept[of_set] += 1
                if remark is not None:
                    self.remarked += 1
                    self.remarks += [(name, remark)] if len(self.remarks) < EXAMPLES else []
                continue
            cause = Cause(of_set, fate, reason)
            self.dropped[cause] += 1
            examples = self.examples.setdefault(cause, [])
            if len(examples) < EXAMPLES:
                examples.append((name, remark or ""))


def write_fates(config: CurateConfig, steps: Sequence[Step]) -> Fates:
    """Write ``fates.parquet`` and ``dropped.csv`` into the output of a curation, one shard after the other.

    Args:
        config: the curation.
        steps: its finished steps.
    """
    parquet = require("pyarrow.parquet", extra="curate", purpose="curation")
    csv = require("pyarrow.csv", extra="curate", purpose="curation")
    compute = require("pyarrow.compute", extra="curate", purpose="curation")
    storage, fates, schema = Storage(config.output), Fates(), _schema()
    with ExitStack() as stack:
        file = stack.enter_context(storage.replace(f"{storage.root}/{FATES}"))
        text = stack.enter_context(storage.replace(f"{storage.root}/{DROPPED}"))
        table_writer = stack.enter_context(parquet.ParquetWriter(file, schema))
        text_writer = stack.enter_context(csv.CSVWriter(text, schema))
        for table in _tables(config, steps):
            fates.add(table)
            table_writer.write_table(table)
            text_writer.write_table(table.filter(compute.is_valid(table["reason"])))
    return fates


def _tables(config: CurateConfig, steps: Sequence[Step]) -> Iterator[Any]:
    """The parts of the table in order: the pool shard by shard, then evaluation sets and seeds."""
    for step in steps:
        if step.name == "extract-links":
            for task in step.tasks:
                yield _of_skipped(POOL, step, read_skipped(step.folder, task.shard))
        if step.name == "download-plan":
            yield _of_skipped(POOL, step, read_skipped(step.folder, "all"))
    lost = _lost(steps)
    yield from _of_pool(POOL, KEPT, pool_of(config, steps), steps, lost.get(0, {}))
    for name, pool in sets_of(config, "evaluation_sets", steps).items():
        yield from _of_pool(f"evaluation_sets/{name}", USED, pool, steps, {})
    seeds = sets_of(config, "seeds", steps)
    sources = sorted(seeds if "*" in config.materialize.as_is else config.materialize.as_is)
    for name, pool in seeds.items():
        number = sources.index(name) + 1 if name in sources else -1
        yield from _of_pool(f"seeds/{name}", USED, pool, steps, lost.get(number, {}))


def _of_pool(
    name: str, in_use: str, pool: Pool, steps: Sequence[Step], lost: dict[int, tuple[str, str]]
) -> Iterator[Any]:
    """The rows of each shard of a pool, and after them its files or links that are in no shard."""
    by_folder = {step.folder: step for step in steps}
    own = by_folder.get(pool.images)
    start = 0
    for shard in pool.shards():
        index = pool.index(shard)
        judged = _judged(pool, shard, len(index), in_use, by_folder)
        for row in range(len(index)) if lost else ():
            if start + row in lost and judged["reason"][row] is None:
                judged["fate"][row] = "materialize"
                judged["reason"][row], judged["remark"][row] = lost[start + row]
        start += len(index)
        yield _table(
            {
                "set": [name] * len(index),
                "name": names_of(index, shard),
                "shard": [shard] * len(index),
                "row": range(len(index)),
                **{side: index[side] if side in index.column_names else [None] * len(index) for side in SIDES},
                **judged,
            }
        )
        if own is not None and own.name == "collect-images":
            yield _of_skipped(name, own, read_skipped(own.folder, shard))
        if own is not None and own.name == "download-images":
            failed = read_table(own.folder, shard, ["url", "reason", "remark"])
            failed = failed.filter(failed["reason"].is_valid())
            yield _of_skipped(name, own, failed.rename_columns(["name", "reason", "remark"]))

    if own is not None and own.name == "collect-images":
        yield _of_skipped(name, own, _left_out(own.inputs[0]))


def _left_out(folder: str) -> Any:
    """The files of a folder that are no images by their name or content, as a table of skipped files."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    storage, rows = Storage(folder), list[tuple[str, str]]()
    with warnings.catch_warnings(), contextlib.suppress(OSError):  # it may be gone by now
        warnings.simplefilter("ignore")  # the run has said it
        paths = list(storage.find())
        outputs = of_outputs(storage, paths)
        left_out = images_among(paths, storage).left_out
        rows = [(escaped(path), f"no image: {why}") for path, why in sorted(left_out.items()) if path not in outputs]
    columns = [[row[number] for row in rows] for number in range(2)]
    return arrow.table(
        {
            "name": arrow.array(columns[0], arrow.string()),
            "reason": arrow.array(columns[1], arrow.string()),
            "remark": arrow.nulls(len(rows), arrow.string()),
        }
    )


Texts = npt.NDArray[np.object_]  # [n] texts or None


def _judged(pool: Pool, shard: str, rows: int, in_use: str, by_folder: dict[str, Step]) -> dict[str, Texts]:
    """The columns fate, reason, remark and instead of a shard."""
    columns = {name: np.full(rows, None, object) for name in ("fate", "reason", "remark", "instead")}
    columns["fate"][:] = in_use
    for folder in pool.decisions:
        table = read_table(folder, shard)
        here = table["reason"].is_valid().to_numpy()  # rows that were out before have no reason
        columns["fate"][here] = by_folder[folder].stage
        for name, values in (
            ("reason", _texts(table, "reason")),
            ("instead", _instead(table, by_folder)),
            ("remark", _texts(table, "remark")),
        ):
            known = np.array([value is not None for value in values], dtype=bool)
            known &= here | (name == "remark")
            columns[name][known] = values[known]
    return columns


def _texts(table: Any, name: str) -> Texts:
    texts = np.full(len(table), None, object)
    if name in table.column_names:
        texts[:] = table[name].to_pylist()
    return texts


def _instead(table: Any, by_folder: dict[str, Step]) -> Texts:
    """Where the image is that is kept instead of each row, by the columns of screening and deduplication."""
    places = np.full(len(table), None, object)
    if "kept_row" in table.column_names:  # a number among all rows
        layout = next(read_layout(folder) for folder, step in by_folder.items() if step.name == "screen-rows")
        numbers, rows = layout.locate(table["kept_row"].to_numpy())
        places[:] = [f"{layout.names[number]}/{row}" for number, row in zip(numbers, rows, strict=True)]
        places[[reason not in REPEATS for reason in table["reason"].to_pylist()]] = None
    for columns in (("representative_shard", "representative_row"), ("reference", "reference_shard", "reference_row")):
        if set(columns) <= set(table.column_names):
            for number, place in enumerate(zip(*(table[name].to_pylist() for name in columns), strict=True)):
                if None not in place:
                    places[number] = "/".join(map(str, place))
    return places


def names_of(index: Any, shard: str) -> list[str]:
    """The best name that the index has for each row."""
    columns = [index[name].to_pylist() for name in ("path", "url") if name in index.column_names]
    keys = index["key"].to_pylist() if "key" in index.column_names else range(len(index))
    names = zip(*columns, strict=True) if columns else ((),) * len(index)
    return [next(filter(None, row), f"{shard}/{key}") for row, key in zip(names, keys, strict=True)]


def _of_skipped(name: str, step: Step, skipped: Any) -> Any:
    """Rows about files or links that are in no shard."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    rows = len(skipped)
    columns = {"set": [name] * rows, "fate": [step.stage] * rows}
    columns |= {column: skipped[column] for column in ("name", "reason", "remark")}
    return _table({column: columns.get(column, arrow.nulls(rows)) for column in COLUMNS})


def _lost(steps: Sequence[Step]) -> dict[int, dict[int, tuple[str, str]]]:
    """Reason and remark of images that could not be written into the final set, by source and position."""
    lost: dict[int, dict[int, tuple[str, str]]] = {}
    for step in steps:
        for task in step.tasks if step.name == "materialize-set" else ():
            table = read_table(step.folder, f"{task.shard}{LOST}").to_pydict()
            for source, position, reason, remark in zip(*table.values(), strict=True):
                lost.setdefault(source, {})[position] = reason, remark
    return lost


def _schema() -> Any:
    arrow = require("pyarrow", extra="curate", purpose="curation")
    return arrow.schema([(name, arrow.type_for_alias(alias)) for name, alias in COLUMNS.items()])


def _table(columns: dict[str, Any]) -> Any:
    arrow = require("pyarrow", extra="curate", purpose="curation")
    schema = _schema()
    arrays = []
    for kind, values in zip(schema, (columns[name] for name in COLUMNS), strict=True):
        known = hasattr(values, "cast")
        arrays.append(values.cast(kind.type) if known else arrow.array(list(values), kind.type))
    return arrow.table(arrays, schema=schema)
