"""Images that repeat another: by their bytes, which are compared before anything is decoded, or by their PCA hash."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.curate.hashing import near_pairs
from dinov2.curate.pool import Pool
from dinov2.curate.search.vectors import Positions
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.shards.storage import Storage


def same_bytes(pool: Pool, output: str) -> Steps[str]:
    """Find the first of the files with the same bytes, which stands for the others.

    The value is a folder of tables ``SHARD.parquet``: ``keep`` (bool) says whether no earlier row has the same bytes,
    and ``first`` (int64) is the position of the first row that has them. A row whose bytes the index does not tell by
    ``sha256`` is like no other. So is one that was out before, and one that lies behind the end of a cut-off tar.
    """
    step = Step(output, "screen-bytes", pool.fingerprint(), pool.inputs, [Task("all", _compare_bytes, (pool,))])
    yield step
    return step.folder


def _compare_bytes(output: Output, pool: Pool) -> Counts:
    """Task: write the tables of :func:`same_bytes`."""
    storage, shards = Storage(pool.images), pool.shards()
    tars, digests, among, rows_in = storage.shards(), [np.zeros(0, "S64")], [np.zeros(0, bool)], 0
    for shard in shards:
        index, kept = pool.index(shard, ["sha256", "offset", "size"]), pool.kept(shard)
        digests.append(_digests(index))
        ends = index["offset"].to_numpy() + index["size"].to_numpy()
        among.append(kept & (ends <= storage.filesystem.size(tars[shard])))
        rows_in += int(kept.sum())
    first = first_of_equals(np.concatenate(digests), np.concatenate(among))
    is_first, start = first == np.arange(len(first)), 0
    for shard, own in zip(shards, among[1:], strict=True):
        rows = slice(start, start + len(own))
        Output(output.folder, shard).write_table({"keep": is_first[rows], "first": first[rows]})
        start += len(own)
    return Counts(rows_in, rows_in - int((~is_first).sum()))


def originals(pool: Pool, shard: str, rows: Positions) -> Positions:
    """For each of some rows [n] of a shard, the first of them with the same bytes; [n]."""
    digests = _digests(pool.index(shard, ["sha256"]).take(rows))
    return rows[first_of_equals(digests, np.ones(len(rows), bool))]


def _digests(index: Any) -> npt.NDArray[np.bytes_]:
    """The digests of an index, empty where it has none."""
    return np.asarray(index["sha256"].fill_null("").to_numpy(), "S64")


def first_of_equals(digests: npt.NDArray[np.bytes_], among: npt.NDArray[np.bool_]) -> Positions:
    """For each of N rows the first of those ``among`` all, bool [N], with the same digest [N]; other rows, and those
    whose digest is empty, get their own number; int64 [N]."""
    first = np.arange(len(digests))
    rows = np.flatnonzero(among & (digests != b""))
    _, place, inverse = np.unique(digests[rows], return_index=True, return_inverse=True)
    first[rows] = rows[place[inverse]]
    return first


def largest_of_alike(
    hashes: npt.NDArray[np.uint64], among: npt.NDArray[np.bool_], areas: npt.NDArray[np.int64], distance: int
) -> Positions:
    """For each of N rows the largest image, and the first among equals, of those that near hashes connect it with.

    Args:
        hashes: PCA hashes [N].
        among: which rows are compared, bool [N]; others get their own number.
        areas: pixels of the images [N].
        distance: hashes that differ in at most so many bits are near; -1: none are.
    """
    from dinov2.curate.components import Components  # it loads compiled code

    of, rows = np.arange(len(hashes)), np.flatnonzero(among)
    if distance < 0 or not len(rows):
        return of
    components, pairs = Components(len(rows)), near_pairs(hashes[rows], distance)
    components.join(pairs[:, 0].copy(), pairs[:, 1].copy())
    component = components.labels()
    order = np.lexsort((rows, -areas[rows], component))
    _, best, number = np.unique(component[order], return_index=True, return_inverse=True)
    of[rows[order]] = rows[order][best[number]]
    return of
