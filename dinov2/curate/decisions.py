"""The table by which a stage says which rows go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.curate.steps import Counts, Output
from dinov2_kernels._extras import require


def write_decisions(
    output: Output,
    reasons: Sequence[str | None],
    before: npt.NDArray[np.bool_],
    columns: Mapping[str, Any] | None = None,
    figures: Mapping[str, int] | None = None,
) -> Counts:
    """Write ``keep`` and ``reason`` of every row, with other columns beside them.

    Args:
        output: of the task.
        reasons: why a row is dropped, None where it is kept; [n]. What it says of rows that were out before is ignored.
        before: which rows were still in, [n]; the others get ``keep`` false and no reason.
        columns: arrays or lists [n] by name.
        figures: for the counts.

    Returns:
        Counts of the rows that were in before.
    """
    arrow = require("pyarrow", extra="curate", purpose="curation")
    own = [reason if was_in else None for reason, was_in in zip(reasons, before.tolist(), strict=True)]
    keep = [was_in and reason is None for reason, was_in in zip(own, before.tolist(), strict=True)]
    table = {"keep": arrow.array(keep, arrow.bool_()), "reason": arrow.array(own, arrow.string())}
    output.write_table(table | dict(columns or {}))
    dropped = Counter(reason for reason in own if reason is not None)
    return Counts(int(before.sum()), sum(keep), dict(sorted(dropped.items())), dict(figures or {}))
