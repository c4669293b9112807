"""The stage: features beside every image that is still in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinov2.curate.decisions import write_decisions
from dinov2.curate.embed.config import EmbedConfig
from dinov2.curate.embed.models import BUILT_IN, Features, Model, open_model
from dinov2.curate.plugins import identity_of, is_function
from dinov2.curate.pool import Pool
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image

UNREADABLE, FEATURELESS = "unreadable", "without features"


def embed(pool: Pool, config: EmbedConfig, output: str) -> Steps[Pool]:
    """Write the features of a pool's images: float16 [n, D] a shard, of unit length, NaN in rows that have none.

    Args:
        pool: images.
        config: which features.
        output: folder or URL of the whole curation.

    Returns:
        The pool with its features, and without images that have none.

    Raises:
        ValueError, FileNotFoundError: there is no such model.
    """
    name = config.model
    if not (name in BUILT_IN or is_function(name) or Path(name).exists()):
        raise FileNotFoundError(
            f"embed.model must be {', '.join(BUILT_IN)}, MODULE:FUNCTION or a file, but is {name!r}"
        )
    settings = dataclasses.replace(config, device="auto", model=name if name in BUILT_IN else identity_of(name))
    tasks = [Task(shard, _embed, (pool, shard, config)) for shard in pool.shards()]
    features = Step(output, "embed-features", settings, (pool.images, *pool.decisions), tasks, gpu=True)
    yield features
    return dataclasses.replace(pool.after(features.folder), features=features.folder)


def _embed(output: Output, pool: Pool, shard: str, config: EmbedConfig) -> Counts:
    """Task: the features of a shard."""
    model = open_model(config)
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


def _width(model: Model) -> int:
    """Numbers of a feature, from an image that is nobody's."""
    width: int = model([np.zeros((64, 64, 3), np.uint8)]).shape[1]
    return width
