"""Exact search, and a record of the nearest neighbours found so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.search.vectors import CHUNK, Positions, Vectors, exact_cosines

if TYPE_CHECKING:
    import torch

TILE = 2048  # queries and rows compared at once; their products stay in the cache

DENSE = 1 / 32  # if more of a tile's pairs need an exact product, computing all of them costs less

# The largest error of a product of vectors of unit length. bfloat16 rounds both factors and the sum by 2^-9 of their
# size each, and the absolute products of a pair of vectors add up to 1 at most (Cauchy and Schwarz). The bound of
# float32 leaves room for the TF32 of GPUs.
ERROR = {"bfloat16": 2.0**-7, "float32": 2.0**-9}


class Pairs(NamedTuple):
    """Pairs of neighbours, sorted by query, then by descending cosine, then by position.

    Attributes:
        query: number or position of the query, int64 [N].
        neighbour: position in the pool that was searched, int64 [N].
        cosine: cosine of the pair, float32 [N].
    """

    query: npt.NDArray[np.int64]
    neighbour: npt.NDArray[np.int64]
    cosine: npt.NDArray[np.float32]

    def where(self, mask: npt.NDArray[np.bool_]) -> Pairs:
        """The pairs where a mask [N] is true."""
        return Pairs(self.query[mask], self.neighbour[mask], self.cosine[mask])

    def shifted(self, start: int) -> Pairs:
        """The pairs with ``start`` added to the number of each query."""
        return self._replace(query=self.query + start)


NONE = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


def best(parts: list[Pairs], k: int) -> Pairs:
    """The k nearest neighbours of each query; among equals, those of the lowest position."""
    joined = Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else NONE
    order = np.lexsort((joined.neighbour, -joined.cosine, joined.query))
    query = joined.query[order]
    first = np.searchsorted(query, query, side="left")  # [N] start of the query's neighbours
    order = order[np.arange(len(query)) - first < k]
    return Pairs(joined.query[order], joined.neighbour[order], joined.cosine[order])


class Running:
    """Collects the k nearest neighbours of each query from pairs that come piece by piece.

    Args:
        queries: number of queries.
        k: largest number of neighbours of a query.
        threshold: only larger cosines count.

    Attributes:
        floor: cosines up to this cannot change a query's neighbours, float32 [queries]. It may be too low for a while.
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
        if self._waiting > 2 * len(self.floor):  # sorting costs more than comparing a tile
            self._settle()

    def result(self) -> Pairs:
        """The nearest neighbours among all pairs added."""
        self._settle()
        return self._parts[0]

    def _settle(self) -> None:
        kept = best(self._parts, self.k)
        self._parts, self._waiting = [kept], 0
        full = np.flatnonzero(np.bincount(kept.query, minlength=len(self.floor)) >= self.k)
        last = np.searchsorted(kept.query, full, side="right") - 1
        self.floor[full] = kept.cosine[last]


def rough_type(device: torch.device) -> torch.dtype:
    """bfloat16 if the processor's matrix units make it fast, else float32. Results do not depend on it."""
    import torch

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
    """Find the k nearest neighbours of each query with a cosine above the threshold.

    Args:
        queries: vectors [Q, D] of the queries.
        own: positions [Q] of the queries in the searched pool, if they are its rows; no query is its own neighbour.
        portions: vectors [N, D] and positions [N] of the searched pool; positions ascend from portion to portion.
        k: largest number of neighbours of a query.
        threshold: only larger cosines count.
        rough: dtype of the first comparison; by default the fastest on this machine.

    Returns:
        Pairs whose query is a number in [0, Q).
    """
    import torch

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
    """All pairs of a tile above the query's floor; in a dense tile at least the k + 1 best of each query."""
    rows, columns = _candidates(scores, floor)
    if len(rows) > DENSE * scores.numel():
        return _compare_all(floor, queries, others, k)
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        cosines[chunk] = exact_cosines(queries[rows[chunk]], others[columns[chunk]])
    return Pairs(rows, columns, cosines).where(cosines > floor[rows])


def _candidates(scores: torch.Tensor, floor: npt.NDArray[np.float32]) -> tuple[Positions, Positions]:
    """Rows and columns of the products [Q, N] that may exceed the floor [Q] of their row."""
    import torch

    least = floor - np.float32(ERROR[str(scores.dtype).removeprefix("torch.")])
    if scores.is_cuda:
        found = (scores.float() > torch.from_numpy(least).to(scores.device)[:, None]).nonzero().cpu().numpy()
        return found[:, 0], found[:, 1]
    if scores.dtype == torch.float32 or least.min() <= 0:
        values = scores.float().numpy()
    else:  # positive numbers sort like their bits, and integers compare faster
        values, least = scores.view(torch.int16).numpy(), (least.view(np.int32) >> 16).astype(np.int16)  # rounds down
    some = np.flatnonzero(values.max(1) >= least)  # most rows have no candidate, and a maximum costs less than a mask
    rows, columns = np.nonzero(values[some] >= least[some, None])
    return some[rows], columns


def _compare_all(floor: npt.NDArray[np.float32], queries: Vectors, others: Vectors, k: int) -> Pairs:
    """Compute exact products of all pairs. A sum in float64 has no error, see :func:`exact_cosines`."""
    import torch

    products = torch.from_numpy(queries).double() @ torch.from_numpy(others).double().T
    cosines = products.float().numpy()  # [Q, N]
    least = floor
    if k + 1 < len(others):  # k + 1, because a query may be its own neighbour, which is removed later
        kth = np.partition(cosines, len(others) - k - 1, axis=1)[:, len(others) - k - 1]
        least = np.maximum(floor, np.nextafter(kth, np.float32(-2)))
    rows, columns = np.nonzero(cosines > least[:, None])
    return Pairs(rows, columns, cosines[rows, columns])
