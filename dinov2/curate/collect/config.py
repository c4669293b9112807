"""Settings of the collect stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CollectConfig:
    """How files become shards."""

    shard_size: int = 10_000
    """Files of a shard."""
    max_bytes: int = 50_000_000
    """Of a file; larger ones are left out."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"collect.{name} must be positive, but is {getattr(self, name)}")
