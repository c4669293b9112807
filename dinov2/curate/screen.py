"""From measures to decisions: what is unfit by itself, then what repeats something that is fit."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.decisions import write_decisions
from dinov2.curate.dedup.components import Components
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.screen.config import ScreenConfig
from dinov2.curate.screen.hashing import near_pairs
from dinov2.curate.steps import Counts, Output

UNREADABLE = "unreadable"
TOO_SMALL, TOO_LONG = "too small", "too long"
PLAIN, BLURRED = "plain", "blurred"
NSFW = "NSFW"
EXACT, NEAR = "exact duplicate", "near-duplicate (PCA hash)"


class Repeats(NamedTuple):
    """Which rows of all shards, in their order, repeat another.

    Attributes:
        exact: [N] bool, the same bytes as an earlier row.
        near: [N] bool, nearly the same picture as another.
        of: [N] int64, the row that is kept in its place; its own where it repeats none.
    """

    exact: npt.NDArray[np.bool_]
    near: npt.NDArray[np.bool_]
    of: npt.NDArray[np.int64]


def find_repeats(output: Output, pool: Pool, measures: str, hashes: str, config: ScreenConfig) -> Counts:
    """Task: write ``all.parquet`` with the columns of :class:`Repeats`, of all shards one after the other.

    Rows that are unfit by themselves repeat nothing and are repeated by nothing. Of equal files the first is kept; of
    near-duplicates the one of most pixels, of equally large ones the first.
    """
    fit, digests, areas = [np.zeros(0, bool)], list[str](), [np.zeros(0, np.int64)]
    bits, hashed = [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
    for shard in pool.shards():
        index = pool.index(shard, ["sha256", "width", "height"])
        table = read_table(measures, shard)
        fit.append(np.array([reason is None for reason in unfit(index, table, config)]) & pool.kept(shard))
        digests += index["sha256"].fill_null("").to_pylist()
        areas.append(index["width"].to_numpy().astype(np.int64) * index["height"].to_numpy())
        column = read_table(hashes, shard)["pca_hash"]
        hashed.append(column.is_valid().to_numpy())
        bits.append(column.fill_null(0).to_numpy())
    repeats = repeats_of(
        np.concatenate(fit),
        np.array(digests, dtype="S64"),
        np.concatenate(bits),
        np.concatenate(hashed),
        np.concatenate(areas),
        config.max_distance,
    )
    output.write_table(repeats._asdict())
    rows = int(np.concatenate(fit).sum())
    return Counts(rows, rows - int(repeats.exact.sum() + repeats.near.sum()))


def repeats_of(
    fit: npt.NDArray[np.bool_],
    digests: npt.NDArray[np.bytes_],
    hashes: npt.NDArray[np.uint64],
    hashed: npt.NDArray[np.bool_],
    areas: npt.NDArray[np.int64],
    distance: int,
) -> Repeats:
    """Repeats among rows [N] that are fit: by digests of their files where these are not empty, then by hashes where
    there are any."""
    of = np.arange(len(fit))
    rows = np.flatnonzero(fit & (digests != b""))
    _, first, inverse = np.unique(digests[rows], return_index=True, return_inverse=True)
    of[rows] = rows[first[inverse]]
    exact = of != np.arange(len(fit))
    near = np.zeros(len(fit), dtype=bool)
    rows = np.flatnonzero(fit & ~exact & hashed)
    if distance >= 0 and len(rows):
        components, pairs = Components(len(rows)), near_pairs(hashes[rows], distance)
        components.join(pairs[:, 0].copy(), pairs[:, 1].copy())
        component = components.labels()
        order = np.lexsort((rows, -areas[rows], component))
        _, best = np.unique(component[order], return_index=True)
        kept = rows[order[best]]  # of each component, in the order of their numbers
        number = np.unique(component, return_inverse=True)[1]
        of[rows] = kept[number]
        near[rows] = of[rows] != rows
        of[exact] = of[of[exact]]
    return Repeats(exact, near, of)


def unfit(index: Any, measures: Any, config: ScreenConfig) -> list[str | None]:
    """Why each row of a shard is unfit by itself, None where it is not: the first of the reasons that holds."""
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


def decide(
    output: Output, pool: Pool, shard: str, start: int, measures: str, hashes: str, repeats: str, config: ScreenConfig
) -> Counts:
    """Task: decisions on a shard whose first row is row ``start`` of all, with the measures beside them, and in
    ``kept_row`` the row of all that stands for it."""
    index, table = pool.index(shard, ["width", "height"]), read_table(measures, shard)
    reasons = unfit(index, table, config)
    part = read_table(repeats, "all").slice(start, len(reasons))
    for row, (exact, near) in enumerate(zip(part["exact"].to_pylist(), part["near"].to_pylist(), strict=True)):
        reasons[row] = reasons[row] or (EXACT if exact else NEAR if near else None)
    columns = {name: table[name] for name in table.column_names if name != "thumbnail"}
    columns |= {"pca_hash": read_table(hashes, shard)["pca_hash"], "kept_row": part["of"]}
    return write_decisions(output, reasons, pool.kept(shard), columns)
