"""Which engine, and how patient it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dinov2.curate.engines.engine import Engine
from dinov2.curate.engines.inline import Inline
from dinov2.curate.engines.process_pool import ProcessPool
from dinov2.curate.engines.ray_cluster import RayCluster


@dataclass(frozen=True)
class EngineConfig:
    """Where tasks run. Results are the same, byte for byte, whatever is chosen here."""

    kind: Literal["inline", "processes", "ray"] = "processes"
    """inline: one after the other in this process. processes: side by side on this machine. ray: on a cluster."""
    workers: int = 0
    """Tasks at once; 0 is one a core, or all that a cluster has room for."""
    address: str | None = None
    """Of a running Ray cluster, as ray.init takes it; by default one starts on this machine."""
    tries: int = 3
    """How often a shard is tried before it counts as failed."""
    patience: float = 3600
    """Seconds to wait, while no shard appears, for those of other processes (with --shard)."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"engine.workers must be 0 or more, but is {self.workers}")
        if self.tries < 1:
            raise ValueError(f"engine.tries must be 1 or more, but is {self.tries}")
        if self.address is not None and self.kind != "ray":
            raise ValueError(f"engine.address goes with engine.kind ray, but the kind is {self.kind}")

    def open(self) -> Engine:
        """The engine.

        Raises:
            ImportError: it is Ray, which is missing (extra ``ray``).
        """
        match self.kind:
            case "inline":
                return Inline()
            case "processes":
                return ProcessPool(self.workers)
            case "ray":
                return RayCluster(self.address, self.workers)
