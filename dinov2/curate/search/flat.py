"""Exact search, and the nearest neighbours found so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dinov2.curate.search.vectors import CHUNK, Positions, Vectors, exact_cosines

TILE = 2048  # queries and rows compared at once: their products stay in the cache

DENSE = 1 / 32  # share of a tile's pairs from which on it costs less to compare all of them exactly

# How far a product may be off, for vectors of unit length: bfloat16 rounds both factors and the sum by 2^-9 of their
# size each, and the absolute products of a pair of vectors add up to 1 at most (Cauchy and Schwarz). The bound of
# float32 leaves room for the TF32 of GPUs.
ERROR = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-9}


class Pairs(NamedTuple):
    """Neighbours, ordered by query, then from the largest cosine down, equal ones by position.

    Attributes:
        query: number or position of the query, int64 [N].
        neighbour: position in the pool that was searched, int64 [N].
        cosine: float32 [N].
    """

    query: npt.NDArray[np.int64]
    neighbour: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float32]

    def where(self, mask: npt.NDArray[np.bool_]) -> Pairs:
        """Those of a mask [N]."""
        return Pairs(self.query[mask], self.neighbour[mask], self.cosine[mask])

    def shifted(self, start: int) -> Pairs:
        """With queries numbered from ``start`` on."""
        return self._replace(query=self.query + start)


NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def best(parts: list[Pairs], k: int) -> Pairs:
    """The k nearest of each query; of equal ones those of the lowest position."""
    joined = Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else NONE
    order = np.lexsort((joined.neighbour, -joined.cosine, joined.query))
    query = joined.query[order]
    first = np.searchsorted(query, query, side="left")  # [N] where the query's neighbours begin
    order = order[np.arange(len(query)) - first < k]
    return Pairs(joined.query[order], joined.neighbour[order], joined.cosine[order])


class Running:
    """The k nearest of each of some queries, from pairs that come bit by bit.

    Args:
        queries: their number.
        k: neighbours of each, at most.
        threshold: cosines are larger than this.

    Attributes:
        floor: what a cosine must exceed to matter, float32 [queries]. It may lag behind.
    """

    def __init__(self, queries: int, k: int, threshold: float) -> None:
        self.k = k
        self.floor = np.full(queries, threshold, np.float32)
        self._parts: list[Pairs] = []
        self._waiting = 0

    def add(self, pairs: Pairs) -> None:
        """Take pairs with cosines above ``floor``."""
        self._parts.append(pairs)
        self._waiting += len(pairs.query)
        if self._waiting > 2 * len(self.floor):  # sorting costs more than looking at a tile
            self._settle()

    def result(self) -> Pairs:
        """The nearest of all that came."""
        self._settle()
        return self._parts[0]

    def _settle(self) -> None:
        kept = best(self._parts, self.k)
        self._parts, self._waiting = [kept], 0
        full = np.flatnonzero(np.bincount(kept.query, minlength=len(self.floor)) >= self.k)
        last = np.searchsorted(kept.query, full, side="right") - 1
        self.floor[full] = kept.cosine[last]


def rough_type(device: torch.device) -> torch.dtype:
    """bfloat16 where a processor's matrix units make it fast, else float32; results do not depend on it."""
    has_matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_matrix_units() else torch.float32


def search_flat(
    queries: Vectors,
    own: Positions | None,
    portions: Iterable[tuple[Vectors, Positions]],
    k: int,
    threshold: float,
    rough: torch.dtype | None = None,
) -> Pairs:
    """The k nearest of each query with a cosine above the threshold.

    Args:
        queries: [Q, D].
        own: positions [Q] of the queries where they are rows of what is searched; none is its own neighbour.
        portions: vectors [N, D] and positions [N] of what is searched, positions ascending from portion to portion.
        k: neighbours of a query, at most.
        threshold: cosines are larger than this.
        rough: type of the first comparison, by default what is fastest here.

    Returns:
        Pairs whose query is a number in [0, Q).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rough = rough or rough_type(device)
    tiles = {start: Running(min(TILE, len(queries) - start), k, threshold) for start in range(0, len(queries), TILE)}
    coarse = torch.from_numpy(queries).to(device, rough)  # [Q, D]
    for vectors, positions in portions:
        others = torch.from_numpy(vectors).to(device, rough)  # [N, D]
        for start, running in tiles.items():
            tile = slice(start, start + TILE)
            for column in range(0, len(vectors), TILE):
                columns = slice(column, column + TILE)
                scores = coarse[tile] @ others[columns].T
                pairs = _compare(scores, running.floor, queries[tile], vectors[columns], k)
                pairs = pairs._replace(neighbour=positions[columns][pairs.neighbour])
                if own is not None:
                    pairs = pairs.where(own[tile][pairs.query] != pairs.neighbour)
                running.add(pairs)
    return best([running.result().shifted(start) for start, running in tiles.items()], k)


def _compare(scores: torch.Tensor, floor: npt.NDArray[np.float32], queries: Vectors, others: Vectors, k: int) -> Pairs:
    """All pairs of a tile that are above the query's floor, or in a dense tile the k + 1 best of them at least."""
    rows, columns = _candidates(scores, floor)
    if len(rows) > DENSE * scores.numel():
        return _compare_all(floor, queries, others, k)
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        cosines[chunk] = exact_cosines(queries[rows[chunk]], others[columns[chunk]])
    return Pairs(rows, columns, cosines).where(cosines > floor[rows])


def _candidates(scores: torch.Tensor, floor: npt.NDArray[np.float32]) -> tuple[Positions, Positions]:
    """Rows and columns of the products [Q, N] that may be above the floor [Q] of their row."""
    least = floor - np.float32(ERROR[scores.dtype])
    if scores.is_cuda:
        found = (scores.float() > torch.from_numpy(least).to(scores.device)[:, None]).nonzero().cpu().numpy()
        return found[:, 0], found[:, 1]
    if scores.dtype == torch.float32 or least.min() <= 0:
        values = scores.float().numpy()
    else:  # positive numbers are in the order of their bits, for which there are faster instructions
        values, least = scores.view(torch.int16).numpy(), (least.view(np.int32) >> 16).astype(np.int16)  # rounds down
    some = np.flatnonzero(values.max(1) >= least)  # most rows have none, and a maximum costs less than a mask
    rows, columns = np.nonzero(values[some] >= least[some, None])
    return some[rows], columns


def _compare_all(floor: npt.NDArray[np.float32], queries: Vectors, others: Vectors, k: int) -> Pairs:
    """Exact products of all pairs: a sum in float64 has no error, see :func:`exact_cosines`."""
    products = torch.from_numpy(queries).double() @ torch.from_numpy(others).double().T
    cosines = products.float().numpy()  # [Q, N]
    least = floor
    if k + 1 < len(others):  # a query may be its own neighbour, which does not count
        kth = np.partition(cosines, len(others) - k - 1, axis=1)[:, len(others) - k - 1]
        least = np.maximum(floor, np.nextafter(kth, np.float32(-2)))
    rows, columns = np.nonzero(cosines > least[:, None])
    return Pairs(rows, columns, cosines[rows, columns])
