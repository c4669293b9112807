"""The stage: images are measured, then judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from dinov2.curate.pool import Pool
from dinov2.curate.screen.config import ScreenConfig
from dinov2.curate.screen.decide import decide, find_repeats
from dinov2.curate.screen.hashing import BITS, SIDE, fit_directions, thumbnail
from dinov2.curate.screen.measure import measure
from dinov2.curate.search.layout import layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.decoding import UnreadableImageError, decode_image


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
    task = Task("all", _fit, (pool, config))
    fit = Step(output, "screen-fit", [config.hash_sample, config.seed, pool.fingerprint()], inputs, [task])
    yield fit
    tasks = [Task(shard, measure, (pool, shard, fit.folder, config)) for shard in pool.shards()]
    measures = Step(output, "screen-measures", [config.faces, config.nsfw], (*inputs, fit.folder), tasks)
    yield measures
    settings = _thresholds(config)
    task = Task("all", find_repeats, (pool, measures.folder, config))
    repeats = Step(output, "screen-repeats", settings, (*inputs, layout, measures.folder), [task])
    yield repeats
    places = read_layout(layout)
    tasks = [
        Task(shard, decide, (pool, shard, places.range_of(shard)[0], measures.folder, repeats.folder, config))
        for shard in places.names
    ]
    decisions = Step(output, "screen-decisions", settings, (measures.folder, repeats.folder), tasks)
    yield decisions
    return pool.after(decisions.folder)


def _thresholds(config: ScreenConfig) -> dict[str, Any]:
    names = ("min_side", "max_aspect", "min_entropy", "min_sharpness", "max_distance", "nsfw_threshold")
    return {name: getattr(config, name) for name in names}


def _fit(output: Output, pool: Pool, config: ScreenConfig) -> Counts:
    """Task: the directions of the PCA hash, from a sample of the pool."""
    shards = pool.shards()
    ends = np.cumsum([0, *(int(pool.kept(shard).sum()) for shard in shards)])  # of each shard's kept rows among all
    images = int(ends[-1])
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(images, min(config.hash_sample, images), replace=False, shuffle=False))
    thumbnails = []
    for number, shard in enumerate(shards):
        own = chosen[(chosen >= ends[number]) & (chosen < ends[number + 1])] - ends[number]
        if not len(own):
            continue
        files = pool.open_images(shard)
        for row in np.flatnonzero(pool.kept(shard))[own].tolist():
            try:
                small = thumbnail(decode_image(files[row], f"{row} of {shard}"))
            except UnreadableImageError:
                continue
            if small is not None:
                thumbnails.append(small)
    fitted = fit_directions(thumbnails)
    assert fitted.shape == (1 + BITS, SIDE * SIDE)
    output.write_array(fitted)
    return Counts(images, len(thumbnails))
