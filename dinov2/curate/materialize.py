"""The materialize stage: writes the final set as shards that pretraining reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.configuration import Config, Count
from dinov2.curate.clusters import random_keys
from dinov2.curate.faces import Box, blurred_file
from dinov2.curate.pool import Pool, read_array, read_table
from dinov2.curate.search.vectors import layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.remarks import plain
from dinov2.data.shards import ShardImage, write_shard
from dinov2.data.shards.storage import RangeReader, Storage
from dinov2.data.shards.writing import COLUMNS
from dinov2.extras import require

OUT = "cannot be read"
LOST = ".lost"
"""End of the name of a table of images that are not written."""

COLUMNS_OF_STAGES = ("component", "cluster", "times", "seed_set")
"""Columns of decisions that go into the final index if they exist."""


class NothingLeftError(ValueError):
    """No image is left for the final set."""


Source = tuple[str, Pool, str]
"""Name of a set, its images, and the folder of their layout."""


@dataclass(frozen=True)
class MaterializeConfig(Config, at="materialize"):
    """How the materialize stage writes the final set."""

    shard_size: Count = 10_000
    """A shard holds this many images."""
    as_is: tuple[str, ...] = ()
    """Name the sets of seeds whose own images join the final set; * names all. DINOv2 takes ImageNet-22k."""
    blur_faces: bool = True
    """Blur the faces that screening found. Curation changes no other bytes."""
    seed: int = 0
    """This seed decides the order of the images, which are shuffled over all shards."""


def materialize(pool: Pool, seeds: Mapping[str, Pool], config: MaterializeConfig, output: str) -> Steps[str]:
    """Write the kept images, and whole sets of seeds, into shards in random order.

    Bytes stay as they were downloaded, except for images with faces, which are blurred. Besides the columns of every
    index, the final index has ``source`` (set and shard of the image), the columns of the image's old index, and
    results of the stages: component, cluster, times, seed_set.

    Args:
        pool: images; those that are still in are written.
        seeds: sets that ``config.as_is`` may name.
        config: size of shards, whole sets, blurring and seed.
        output: folder or URL of the whole curation.

    Returns:
        Folder of the shards, the ``--data.root`` of pretraining.

    Raises:
        ValueError: ``config.as_is`` names an unknown set.
        NothingLeftError: no image is left (a ValueError).
    """
    names = sorted(seeds) if "*" in config.as_is else list(config.as_is)
    if unknown := set(names) - set(seeds):
        raise ValueError(f"materialize.as_is: expected names of sets of seeds, {sorted(seeds)}, got {sorted(unknown)}")
    pools = {"": pool} | {name: seeds[name] for name in sorted(names)}
    layouts = {}
    for name, source in pools.items():
        layouts[name] = yield from layout_of(source, "materialize", output)
    sources = tuple((name, source, layouts[name]) for name, source in pools.items())
    inputs = tuple(folder for _, source, layout in sources for folder in (*source.inputs, layout))
    settings = [config.seed, [name for name, _, _ in sources]]
    plan = Step(output, "materialize-plan", settings, inputs, [Task("all", _plan, (sources, config.seed))])
    yield plan
    images = plan.counts().rows_out
    if not images:
        raise NothingLeftError(f"no image is left to write: see under {output} what the stages dropped")
    tasks = [
        Task(f"{number:05d}", _write, (sources, plan.folder, start, stop, config), stop - start)
        for number, start in enumerate(range(0, images, config.shard_size))
        for stop in [min(start + config.shard_size, images)]
    ]
    settings = [config.shard_size, config.blur_faces]
    final = Step(output, "materialize-set", settings, (plan.folder, *inputs), tasks, version=2)
    yield final
    if not final.counts().rows_out:
        raise NothingLeftError(f"none of {images} images could be written: {final.folder} has the reasons")
    return final.folder


def _plan(output: Output, sources: tuple[Source, ...], seed: int) -> Counts:
    """Task: write ``all.npy``, int64 [N, 2]: each image's source number and position in it, in final order."""
    parts, rows = [np.zeros((0, 2), np.int64)], 0
    for number, (_, pool, folder) in enumerate(sources):
        layout = read_layout(folder)
        rows += layout.rows
        for shard in layout.names:
            kept = layout.range_of(shard)[0] + np.flatnonzero(pool.kept(shard))
            parts.append(np.stack([np.full(len(kept), number), kept], axis=1))
    entries = np.concatenate(parts)
    keys = random_keys(entries[:, 1] + (entries[:, 0] << 48), seed, "materialize")
    output.write_array(entries[np.argsort(keys, kind="stable")])
    return Counts(rows, len(entries))


def _write(
    output: Output, sources: tuple[Source, ...], plan: str, start: int, stop: int, config: MaterializeConfig
) -> Counts:
    """Task: write one shard, and the table of the images that cannot be written, with their source and position."""
    entries = np.array(read_array(plan, "all")[start:stop])
    lost, blurred = list[tuple[int, str, str]](), 0  # number in the plan, reason, remark

    def images() -> Iterator[ShardImage]:
        nonlocal blurred
        for place, (content, columns, faces) in enumerate(read_images(sources, entries), start):
            output.advance()
            if faces and config.blur_faces:
                try:
                    content = blurred_file(content, faces)
                except (OSError, ValueError) as error:
                    lost.append((place, OUT, plain(str(error))))  # an image is not written with visible faces
                    continue
                blurred += 1
            yield ShardImage(f"{place:09d}", content, columns)

    report = write_shard(
        images(),
        output.folder,
        int(output.shard),
        lambda image, reason, remark: lost.append((int(image.key), reason, remark)),
    )
    _write_lost(output, entries, start, lost)
    dropped = Counter(reason for _, reason, _ in lost)
    return Counts(len(entries), report.images, dict(sorted(dropped.items())), {"blurred": blurred})


def _write_lost(output: Output, entries: npt.NDArray[np.int64], start: int, lost: list[tuple[int, str, str]]) -> None:
    """Write ``SHARD.lost.parquet``: source (its number), position, reason and remark of images that are not written."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    places = entries[[number - start for number, _, _ in lost]].reshape(-1, 2)
    table = {
        "source": places[:, 0],
        "position": places[:, 1],
        "reason": arrow.array([reason for _, reason, _ in lost], arrow.string()),
        "remark": arrow.array([remark for _, _, remark in lost], arrow.string()),
    }
    Output(output.folder, f"{output.shard}{LOST}").write_table(table)


class Planned(NamedTuple):
    """An image that is to be written.

    Attributes:
        content: bytes of the file; fewer if the tar is cut off.
        columns: values for the index.
        faces: boxes of the faces found in it.
    """

    content: bytes
    columns: dict[str, Any]
    faces: list[Box]


class _Place(NamedTuple):
    path: str
    offset: int
    size: int
    columns: dict[str, Any]


def read_images(sources: tuple[Source, ...], entries: npt.NDArray[np.int64]) -> Iterator[Planned]:
    """Read the images of ``entries``, int64 [N, 2] (source number, position in it), in that order.

    The tables are read first, one shard at a time; only rows of these images are kept. So memory grows with N, not with
    the number of shards. Then the files are read one by one, with one reader for each source.
    """
    places: dict[tuple[int, int], _Place] = {}
    readers = {}
    for number in np.unique(entries[:, 0]).tolist():
        name, pool, layout = sources[number]
        readers[number] = RangeReader(Storage(pool.images).filesystem)
        found = _places(name, pool, layout, np.sort(entries[entries[:, 0] == number, 1]))
        places |= {(number, position): place for position, place in found}
    for number, position in entries.tolist():
        place = places.pop((number, position))
        faces = [Box(**box) for box in place.columns.pop("faces", None) or []]
        yield Planned(readers[number](place.path, place.offset, place.size), place.columns, faces)


def _places(name: str, pool: Pool, folder: str, positions: npt.NDArray[np.int64]) -> Iterator[tuple[int, _Place]]:
    """Places of the images at ascending positions [N] of a source, with their positions."""
    layout, tars = read_layout(folder), Storage(pool.images).shards()
    numbers, rows = layout.locate(positions)
    computed = COLUMNS.keys() - {"url"}
    for number in np.unique(numbers).tolist():
        shard, here = layout.names[number], numbers == number
        index = pool.index(shard).take(rows[here])
        columns = {column: index[column].to_pylist() for column in index.column_names if column not in computed}
        for decisions in pool.decisions:
            table = read_table(decisions, shard).take(rows[here])
            for column in (name for name in (*COLUMNS_OF_STAGES, "faces") if name in table.column_names):
                columns[column] = table[column].to_pylist()
        columns["source"] = [f"{name}/{shard}" if name else shard] * int(here.sum())
        offsets, sizes = index["offset"].to_pylist(), index["size"].to_pylist()
        for i, position in enumerate(positions[here].tolist()):
            own = {column: values[i] for column, values in columns.items()}
            yield position, _Place(tars[shard], offsets[i], sizes[i], own)
