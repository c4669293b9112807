"""Where tasks run: in this process, in several of this machine, or on a cluster of Ray."""

from dinov2.curate.engines.engine import Call, Engine, LostTaskError, Outcome
from dinov2.curate.engines.inline import Inline
from dinov2.curate.engines.process_pool import ProcessPool

__all__ = ["Call", "Engine", "Inline", "LostTaskError", "Outcome", "ProcessPool"]
