"""Settings of retrieval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dinov2.curate.clusters import ClusterConfig
from dinov2.curate.search import SearchConfig


@dataclass(frozen=True)
class RetrieveConfig:
    """Which images of the pool are chosen."""

    method: Literal["auto", "sample", "cluster", "hierarchical"] = "auto"
    """sample: the nearest of each seed image. cluster: some of each cluster that holds seeds. hierarchical: as many of
    each cluster of clusters, without seeds. auto: for each set of seeds by its size; without seeds everything."""
    cluster_below: int = 1_000_000
    """Images of a set of seeds below which auto is cluster."""
    neighbours: int = 4
    """Images for each seed."""
    neighbours_of: tuple[str, ...] = ()
    """For some sets another number of them, as in imagenet1k=32."""
    min_seeds: int = 4
    """Seeds that a cluster must hold to count: DINOv2 wants more than three."""
    per_cluster: int = 10_000
    """Images of such a cluster at most."""
    cap: int = 1_000_000
    """Images for a set of seeds whose clusters are asked for, at most; neighbours are not counted."""
    total: int = 0
    """Images of a hierarchical sample; 0 is half of the pool."""
    seed: int = 0
    """Of what is drawn."""
    clusters: ClusterConfig = field(default_factory=ClusterConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for name in ("neighbours", "min_seeds", "per_cluster", "cap"):
            if getattr(self, name) < 1:
                raise ValueError(f"retrieve.{name} must be positive, but is {getattr(self, name)}")
        if self.total < 0:
            raise ValueError(f"retrieve.total must be 0 or more, but is {self.total}")
        self.own_neighbours()

    def own_neighbours(self) -> dict[str, int]:
        """What ``neighbours_of`` says, by set.

        Raises:
            ValueError: an entry is not NAME=NUMBER.
        """
        numbers = {}
        for entry in self.neighbours_of:
            name, _, number = entry.partition("=")
            if not name or not number.isdigit() or int(number) < 1:
                raise ValueError(f"retrieve.neighbours_of must be made of NAME=NUMBER, but holds {entry!r}")
            numbers[name] = int(number)
        return numbers
