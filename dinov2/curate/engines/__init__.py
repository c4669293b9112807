"""Where tasks run: in this process, in several of this machine, or on a cluster of Ray."""

from dinov2.curate.engines.config import EngineConfig
from dinov2.curate.engines.engine import Call, Engine, LostTaskError, Outcome
from dinov2.curate.engines.inline import Inline
from dinov2.curate.engines.process_pool import ProcessPool
from dinov2.curate.engines.ray_cluster import RayCluster

__all__ = ["Call", "Engine", "EngineConfig", "Inline", "LostTaskError", "Outcome", "ProcessPool", "RayCluster"]
