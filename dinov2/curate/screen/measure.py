"""What an image says of itself when it is looked at, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.plugins import load_function, open_onnx
from dinov2.curate.pool import Pool
from dinov2.curate.screen.config import ScreenConfig
from dinov2.curate.screen.faces import Box, open_detector
from dinov2.curate.screen.hashing import SIDE, thumbnail
from dinov2.curate.steps import Counts, Output
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image
from dinov2_kernels._extras import require

BATCH = 16
BATCH_PIXELS = 2**25  # from which on a batch is full: 100 MB, whatever the images
QUALITY_SIDE = 256  # pixels of the longer side that sharpness is measured at
NSFW_SIDE = 224

Scorer = Callable[[list[Pixels]], npt.NDArray[np.float32]]


class Quality(NamedTuple):
    """Measures of an image."""

    entropy: float
    sharpness: float


def measure(output: Output, pool: Pool, shard: str, config: ScreenConfig) -> Counts:
    """Task: write for every row of a shard

    ===============  ========================  ========================================================================
    ``readable``     bool                      whether it could be decoded; else all other columns are null
    ``thumbnail``    1,024 bytes               32 x 32 grey levels, of which the PCA hash is made
    ``entropy``      float32                   of grey levels, in bits
    ``sharpness``    float32                   variance of the Laplacian of the grey image at 256 pixels
    ``nsfw``         float32                   the scorer's; null without a scorer
    ``faces``        list of structs           x, y, width, height (int32) in pixels of the upright image
    ===============  ========================  ========================================================================
    """
    detect, score = open_detector(config.faces), open_scorer(config.nsfw)
    before, files = pool.kept(shard), pool.open_images(shard)
    rows: list[dict[str, Any]] = [dict[str, Any](readable=False) for _ in before]
    batch: list[tuple[int, Pixels]] = []

    def settle() -> None:
        images = [image for _, image in batch]
        faces = detect(images) if detect else [[] for _ in images]
        scores = score(images).tolist() if score else [None] * len(images)
        for (row, _), boxes, nsfw in zip(batch, faces, scores, strict=True):
            rows[row] |= {"faces": [box._asdict() for box in boxes], "nsfw": nsfw}
        batch.clear()

    for row in np.flatnonzero(before).tolist():
        try:
            image = decode_image(files[row], f"{row} of {shard}")
        except UnreadableImageError:
            continue
        rows[row] = {"readable": True, "thumbnail": thumbnail(image).tobytes(), **quality(image)._asdict()}
        batch.append((row, image))
        if len(batch) == BATCH or sum(held.shape[0] * held.shape[1] for _, held in batch) >= BATCH_PIXELS:
            settle()
    if batch:
        settle()
    output.write_table(_table(rows))
    readable = sum(row["readable"] for row in rows)
    found = sum(len(row.get("faces", [])) for row in rows)
    return Counts(int(before.sum()), readable, {}, {"faces": found})


def quality(image: Pixels) -> Quality:
    """Measures of an image uint8 [H, W, 3]."""
    cv2 = require("cv2", extra="curate", purpose="measuring quality")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = min(QUALITY_SIDE / max(grey.shape), 1.0)
    size = tuple(max(1, round(side * scale)) for side in (grey.shape[1], grey.shape[0]))
    small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    shares = np.bincount(small.ravel(), minlength=256) / small.size
    shares = shares[shares > 0]
    return Quality(float(-(shares * np.log2(shares)).sum()), float(cv2.Laplacian(small, cv2.CV_32F).var()))


def open_scorer(name: str) -> Scorer | None:
    """The scorer that a configuration names; None for none.

    Raises:
        ValueError: it cannot be imported, or is no model of one batch.
        ImportError: onnxruntime is missing (extra ``onnx``).
    """
    if not name:
        return None
    if not name.endswith(".onnx"):
        function = load_function(name)
        return lambda images: np.asarray(function(images), np.float32)
    run = open_onnx(name)

    def score(images: list[Pixels]) -> npt.NDArray[np.float32]:
        views = np.stack([resized(image, NSFW_SIDE, NSFW_SIDE).transpose(2, 0, 1) for image in images])
        scores: npt.NDArray[np.float32] = run(views.astype(np.float32) / np.float32(255)).reshape(len(images))
        return scores

    return score


def _table(rows: list[dict[str, Any]]) -> Any:
    arrow = require("pyarrow", extra="curate", purpose="curation")
    box = arrow.struct([(name, arrow.int32()) for name in Box._fields])
    types = {
        "readable": arrow.bool_(),
        "thumbnail": arrow.binary(SIDE * SIDE),
        "entropy": arrow.float32(),
        "sharpness": arrow.float32(),
        "nsfw": arrow.float32(),
        "faces": arrow.list_(box),
    }
    return arrow.table({name: arrow.array([row.get(name) for row in rows], kind) for name, kind in types.items()})
