"""What became of the files that went into shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class ShardReport:
    """Counts of files.

    Attributes:
        shards: how many were written or indexed.
        images: rows of their indices.
        skipped: what else was there, by reason.
        finished_before: shards that had an index already and were left alone.
    """

    shards: int = 0
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    finished_before: int = 0

    def __str__(self) -> str:
        lines = [f"{self.images:,} images in {self.shards:,} shards"]
        lines += [f"  skipped {number:,}: {reason}" for reason, number in self.skipped.most_common()]
        if self.finished_before:
            lines.append(f"  {self.finished_before:,} more shards had an index already")
        return "\n".join(lines)
