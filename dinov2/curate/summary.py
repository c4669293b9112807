"""What became of all rows, stage by stage."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dinov2.curate.steps import Step


class StageSummary(NamedTuple):
    """One run of a stage.

    Attributes:
        name: of the stage.
        unit: what its rows are.
        rows_in: rows that it decided on.
        rows_out: rows that go on.
        dropped: the others, by reason.
        seconds: that it took, of processes that shared the work the sum.
    """

    name: str
    unit: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    seconds: float


def summarize(steps: Iterable[Step]) -> list[StageSummary]:
    """Stages in the order of their steps; those of a stage that follow one another are one run of it.

    What a stage's last step gives is its result, and what its steps about the same kind of rows dropped, it dropped.
    """
    summaries = []
    for name, group in itertools.groupby(steps, key=lambda step: step.stage):
        members = list(group)
        last, dropped = members[-1], Counter[str]()
        for step in members:
            if step.unit == last.unit:
                dropped.update(step.counts().dropped)
        rows_out = last.counts().rows_out
        seconds = sum(step.timing().seconds for step in members)
        summaries.append(
            StageSummary(name, last.unit, rows_out + dropped.total(), rows_out, dict(sorted(dropped.items())), seconds)
        )
    return summaries
