"""Settings of the search."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("auto", "flat", "ivf_sq8", "ivf_rabitq", "ivf_pq")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How neighbours are looked for, and in which portions.

    Attributes:
        index: ``flat`` compares everything with everything and is exact. ``ivf_sq8``, ``ivf_rabitq`` and ``ivf_pq``
            look into the nearest lists of an inverted file only, whose vectors take 8 bits a dimension, 1 bit a
            dimension, or 64 bytes in all; what they find is compared again exactly. ``auto`` is ``flat`` or, where
            there are many rows to search, ``ivf_rabitq``.
        exact_below: number of rows below which ``auto`` is ``flat``; where there are fewer queries than rows to search,
            the square root of the number of pairs.
        lists: of an inverted file; 0 stands for the power of two nearest to 4 sqrt(``index_rows``), or less where there
            are fewer vectors to train on.
        probes: lists looked into for each query; 0 stands for one in 64, and 16 at least.
        query_rows: rows of a portion of queries, rounded to whole shards; a task takes one portion of each side.
        index_rows: rows of a portion of what is searched. Inverted files hold one portion each.
        seed: of the sample that inverted files are trained on.
    """

    index: str = "auto"
    exact_below: int = 1_000_000
    lists: int = 0
    probes: int = 0
    query_rows: int = 50_000
    index_rows: int = 500_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.index not in KINDS:
            raise ValueError(f"index must be one of {', '.join(KINDS)}, but is {self.index!r}")
        for name in ("query_rows", "index_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")
        for name in ("exact_below", "lists", "probes", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")

    def kind(self, rows: int) -> str:
        """What ``auto`` is for a number of rows that search and are searched; else what was set."""
        if self.index != "auto":
            return self.index
        return "flat" if rows < self.exact_below else "ivf_rabitq"

    def number_of_lists(self, rows: int) -> int:
        """Of the inverted files over ``rows`` rows in all."""
        portion = max(min(rows, self.index_rows), 1)
        return self.lists or 2 ** max(round(math.log2(4 * math.sqrt(portion))), 0)

    def number_of_probes(self, lists: int) -> int:
        """Lists looked into, of ``lists``."""
        return min(self.probes or max(16, lists // 64), lists)
