"""The stage: features beside every image that is still in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dinov2.curate.decisions import write_decisions
from dinov2.curate.embed import copies
from dinov2.curate.embed.config import EmbedConfig
from dinov2.curate.embed.models import COPIES, Features, Model, identity, open_model
from dinov2.curate.pool import Pool
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image

UNREADABLE, FEATURELESS = "unreadable", "without features"


def embed(pool: Pool, config: EmbedConfig, output: str, fitted_on: Pool | None = None) -> Steps[Pool]:
    """Write the features of a pool's images: float16 [n, D] a shard, of unit length, NaN in rows that have none.

    Args:
        pool: images.
        config: which features.
        output: folder or URL of the whole curation.
        fitted_on: what features that are fitted to a pool are fitted to, so that those of several pools can be
            compared; by default the pool itself.

    Returns:
        The pool with its features, and without images that have none.

    Raises:
        ValueError, FileNotFoundError: there is no such model.
    """
    model = identity(config)
    fit: str | None = None
    if config.model == COPIES:
        sampled = fitted_on or pool
        step = Step(
            output,
            "embed-fit",
            [config.sample, config.seed, sampled.fingerprint()],
            (sampled.images, *sampled.decisions),
            [Task("all", _fit, (sampled, config))],
        )
        yield step
        fit = step.folder
    settings = dataclasses.replace(config, device="auto", model=model)
    inputs = (pool.images, *pool.decisions, *([fit] if fit else []))
    tasks = [Task(shard, _embed, (pool, shard, config, fit)) for shard in pool.shards()]
    features = Step(output, "embed-features", settings, inputs, tasks, gpu=True)
    yield features
    return dataclasses.replace(pool.after(features.folder), features=features.folder)


def _fit(output: Output, pool: Pool, config: EmbedConfig) -> Counts:
    """Task: fit to a sample of the pool."""
    kept = {shard: np.flatnonzero(pool.kept(shard)) for shard in pool.shards()}
    places = [(shard, row) for shard, rows in kept.items() for row in rows.tolist()]
    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.choice(len(places), min(config.sample, len(places)), replace=False)).tolist() if places else []
    images = [image for image in (_read(pool, *places[number]) for number in chosen) if image is not None]
    copies.save(copies.fit(images, config.seed), output)
    return Counts(len(places), len(images))


def _embed(output: Output, pool: Pool, shard: str, config: EmbedConfig, fit: str | None) -> Counts:
    """Task: the features of a shard."""
    model = open_model(config) if fit is None else copies.load(fit)
    before = pool.kept(shard)
    reasons: list[str | None] = [None] * len(before)
    features: npt.NDArray[np.float16] | None = None
    for rows, images in _batches(pool, shard, before, reasons, config.batch_size):
        found = unit(model(images))
        if features is None:
            features = np.full((len(before), found.shape[1]), np.nan, np.float16)
        features[rows] = found
    if features is None:
        features = np.full((len(before), _width(model)), np.nan, np.float16)
    for row in np.flatnonzero(before & ~np.isfinite(features).all(axis=1)).tolist():
        reasons[row] = reasons[row] or FEATURELESS
    output.write_array(features)
    return write_decisions(output, reasons, before)


def unit(features: Features) -> npt.NDArray[np.float16]:
    """Rows [n, D] scaled to unit length, then rounded; NaN where they have no direction."""
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled: npt.NDArray[np.float16] = np.where(lengths > 0, features / lengths, np.nan).astype(np.float16)
    return scaled


def _batches(
    pool: Pool, shard: str, kept: npt.NDArray[np.bool_], reasons: list[str | None], size: int
) -> Iterator[tuple[list[int], list[Pixels]]]:
    """Rows and images; says of rows that have none why."""
    rows: list[int] = []
    images: list[Pixels] = []
    files = pool.open_images(shard)
    for row in np.flatnonzero(kept).tolist():
        try:
            images.append(decode_image(files[row], f"{row} of {shard}"))
        except UnreadableImageError:
            reasons[row] = UNREADABLE
            continue
        rows.append(row)
        if len(rows) == size:
            yield rows, images
            rows, images = [], []
    if rows:
        yield rows, images


def _read(pool: Pool, shard: str, row: int) -> Pixels | None:
    try:
        return decode_image(pool.open_images(shard)[row], f"{row} of {shard}")
    except UnreadableImageError:
        return None


def _width(model: Model) -> int:
    """Numbers of a feature, from an image that is nobody's."""
    return model([np.zeros((64, 64, 3), np.uint8)]).shape[1]
