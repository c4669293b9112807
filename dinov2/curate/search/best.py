"""The nearest neighbours found so far of some queries."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


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
