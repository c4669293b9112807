"""The stage: images are measured, then judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.curate.plugins import identity_of
from dinov2.curate.pool import Pool, read_array, read_table
from dinov2.curate.screen.config import ScreenConfig
from dinov2.curate.screen.decide import decide, find_repeats
from dinov2.curate.screen.hashing import BITS, SIDE, fit_directions, pca_hashes, standardized
from dinov2.curate.screen.measure import measure
from dinov2.curate.search.layout import layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2_kernels._extras import require


def screen(pool: Pool, config: ScreenConfig, output: str) -> Steps[Pool]:
    """Drop images that are unreadable, too small, too long, plain, blurred, unsafe, or the same as another.

    Args:
        pool: images.
        config: what is unfit.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions, in whose tables are also the measures and the faces.

    Raises:
        ValueError: a plugged-in scorer or detector cannot be imported.
    """
    layout = yield from layout_of(pool, "screen", output)
    inputs = (pool.images, *pool.decisions)
    tasks = [Task(shard, measure, (pool, shard, config)) for shard in pool.shards()]
    plugged_in = [identity_of(config.faces), identity_of(config.nsfw)]
    measures = Step(output, "screen-measures", plugged_in, inputs, tasks)
    yield measures
    task = Task("all", _fit, (pool.shards(), measures.folder, config))
    settings = [config.hash_sample, config.seed, pool.fingerprint()]
    fit = Step(output, "screen-fit", settings, (measures.folder,), [task])
    yield fit
    tasks = [Task(shard, _hash, (shard, measures.folder, fit.folder)) for shard in pool.shards()]
    hashes = Step(output, "screen-hashes", None, (measures.folder, fit.folder), tasks)
    yield hashes
    thresholds = _thresholds(config)
    folders = (measures.folder, hashes.folder)
    task = Task("all", find_repeats, (pool, *folders, config))
    repeats = Step(output, "screen-repeats", thresholds, (*inputs, layout, *folders), [task])
    yield repeats
    places = read_layout(layout)
    tasks = [
        Task(shard, decide, (pool, shard, places.range_of(shard)[0], *folders, repeats.folder, config))
        for shard in places.names
    ]
    decisions = Step(output, "screen-decisions", thresholds, (*folders, repeats.folder), tasks)
    yield decisions
    return pool.after(decisions.folder)


def _thresholds(config: ScreenConfig) -> dict[str, Any]:
    names = ("min_side", "max_aspect", "min_entropy", "min_sharpness", "max_distance", "nsfw_threshold")
    return {name: getattr(config, name) for name in names}


def _fit(output: Output, shards: list[str], measures: str, config: ScreenConfig) -> Counts:
    """Task: the directions of the PCA hash, from a sample of the pool."""
    rows = [np.flatnonzero(read_table(measures, shard, ["readable"])["readable"].to_numpy()) for shard in shards]
    ends = np.cumsum([0, *map(len, rows)])  # of each shard's readable rows among all
    images = int(ends[-1])
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(images, min(config.hash_sample, images), replace=False, shuffle=False))
    parts = [np.zeros((0, SIDE * SIDE), np.uint8)]
    for number, shard in enumerate(shards):
        own = chosen[(chosen >= ends[number]) & (chosen < ends[number + 1])] - ends[number]
        if len(own):
            parts.append(_thumbnails(measures, shard, rows[number][own]))
    units, contrast = standardized(np.concatenate(parts))
    fitted = fit_directions(units[contrast])
    assert fitted.shape == (1 + BITS, SIDE * SIDE)
    output.write_array(fitted)
    return Counts(images, int(contrast.sum()))


def _hash(output: Output, shard: str, measures: str, fit: str) -> Counts:
    """Task: write ``pca_hash`` (uint64) of every row of a shard, null where it is unreadable or has no contrast."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    readable = read_table(measures, shard, ["readable"])["readable"].to_numpy()
    rows = np.flatnonzero(readable)
    units, contrast = standardized(_thumbnails(measures, shard, rows))
    hashes, missing = np.zeros(len(readable), np.uint64), np.ones(len(readable), dtype=bool)
    hashes[rows], missing[rows] = pca_hashes(units, np.array(read_array(fit, "all"))), ~contrast
    output.write_table({"pca_hash": arrow.array(hashes, mask=missing)})
    return Counts(len(rows), int(contrast.sum()))


def _thumbnails(measures: str, shard: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Thumbnails uint8 [N, 1024] of rows that have one."""
    column = read_table(measures, shard, ["thumbnail"])["thumbnail"].take(rows).to_pylist()
    return np.frombuffer(b"".join(column), np.uint8).reshape(len(rows), SIDE * SIDE)
