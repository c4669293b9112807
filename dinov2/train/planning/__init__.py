"""What a run needs, known before it starts: memory, arithmetic and what its processes tell each other."""

from __future__ import annotations

from dinov2.train.planning.plan import Plan, plan, print_plan

__all__ = ["Plan", "plan", "print_plan"]
