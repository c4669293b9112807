"""Settings of the final set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MaterializeConfig:
    """How the final set is written."""

    shard_size: int = 10_000
    """Images of a shard."""
    as_is: tuple[str, ...] = ()
    """Sets of seeds whose own images belong to the set too, by name; * for all. DINOv2 takes ImageNet-22k."""
    blur_faces: bool = True
    """Blur the faces that screening found: the only bytes that curation changes."""
    seed: int = 0
    """Of the order of the images, which are shuffled over all shards."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"materialize.shard_size must be positive, but is {self.shard_size}")
