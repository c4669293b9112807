"""Settings of deduplication."""

from __future__ import annotations

from dataclasses import dataclass, field

from dinov2.curate.search import SearchConfig


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """What counts as a copy of what; thresholds are cosines, and what is linked has a larger one.

    Attributes:
        neighbours: of each image that it may be linked to.
        threshold: above which images of the pool are linked; linked ones are one component, of which one is kept.
        guard_threshold: above which a member of a component is dropped for the one that is kept. Members that are
            further from it are copies of copies; the best of them is kept too, for those near it, and so on. -1 turns
            this off: of each component one image remains.
        guard_rounds: how many images of a component are kept that way before all others of it are kept unseen.
        reference_threshold: above which an image of the pool is linked to a reference image.
        reference_reach: above which images of the pool are linked for what follows from that: all images of a component
            of which one is linked to a reference image are dropped.
        search: how neighbours are found.
    """

    neighbours: int = 64
    threshold: float = 0.6
    guard_threshold: float = 0.6
    guard_rounds: int = 8
    reference_threshold: float = 0.45
    reference_reach: float = 0.6
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        for name in ("neighbours", "guard_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")
        for name in ("threshold", "guard_threshold", "reference_threshold", "reference_reach"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a cosine, from -1 to 1, but is {getattr(self, name)}")
