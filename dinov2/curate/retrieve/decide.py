"""From what the sets of seeds have found to a decision on every row."""

from __future__ import annotations

import numpy as np

from dinov2.curate.clusters import Clusters
from dinov2.curate.decisions import write_decisions
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.search.layout import read_layout
from dinov2.curate.steps import Counts, Output
from dinov2_kernels._extras import require

NOT_CHOSEN = "not retrieved"


def decide(
    output: Output,
    pool: Pool,
    layout: str,
    shard: str,
    chosen: tuple[tuple[str, str], ...],
    clusters: Clusters | None,
) -> Counts:
    """Task: decisions on a shard, with these columns beside them:

    ====================  =========  ==================================================================================
    ``times``             int64      how often the row was asked for
    ``seed_set``          text       the first set that asked for it; null for none, and in a hierarchical sample
    ``seed``              int64      position in it of the seed that is nearest; null where clusters were asked for
    ``cosine``            float32    of that seed; null likewise
    ``cluster``           int32      of the row, -1 for none; null where there are no clusters
    ====================  =========  ==================================================================================
    """
    arrow = require("pyarrow", extra="curate", purpose="curation")
    start, stop = read_layout(layout).range_of(shard)
    before, n = pool.kept(shard), stop - start
    times, of_set = np.zeros(n, np.int64), np.full(n, -1)
    seed, cosine, named = np.full(n, -1), np.full(n, np.nan, np.float32), np.zeros(n, dtype=bool)
    for number, (_, folder) in enumerate(chosen):
        hits = read_table(folder, "all")
        low, high = np.searchsorted(hits["position"].to_numpy(), [start, stop])
        hits = hits.slice(low, high - low)
        rows = hits["position"].to_numpy() - start
        times[rows] += hits["times"].to_numpy()
        new = of_set[rows] < 0
        rows, hits = rows[new], hits.filter(arrow.array(new))
        of_set[rows] = number
        named[rows] = hits["seed"].is_valid().to_numpy()
        seed[rows] = hits["seed"].fill_null(-1).to_numpy()
        cosine[rows] = hits["cosine"].fill_null(np.nan).to_numpy()
    names = [chosen[number][0] or None if number >= 0 else None for number in of_set.tolist()]
    columns = {
        "times": times,
        "seed_set": arrow.array(names, arrow.string()),
        "seed": arrow.array(seed, mask=~named),
        "cosine": arrow.array(cosine, mask=~named),
        "cluster": arrow.nulls(n, "int32") if clusters is None else clusters.read_clusters(shard),
    }
    reasons = [None if asked else NOT_CHOSEN for asked in (times > 0).tolist()]
    return write_decisions(output, reasons, before, columns, {"times asked for": int(times.sum())})
