"""Deduplication of a pool in itself and against reference images, as steps."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.dedup.decide import decide
from dinov2.curate.dedup.graph import Reference, find_components, part_name
from dinov2.curate.dedup.guard import assign, choose
from dinov2.curate.pool import Pool
from dinov2.curate.search import Neighbours, search
from dinov2.curate.search.layout import read_layout
from dinov2.curate.steps import Step, Steps, Task, plain

NAME = re.compile(r"[\w-]+", re.ASCII)


def dedup(pool: Pool, references: Mapping[str, Pool], config: DedupConfig, output: str) -> Steps[Pool]:
    """Keep one of each group of near-copies, and nothing that is near a reference image (appendix A of DINOv2).

    Each image is linked to its nearest neighbours above a threshold; linked images are a component, as are those linked
    to these. Components that are linked to a reference image are dropped as a whole. Of each other component the
    largest image is kept, of equally large ones the first; and of the images that a guard finds unlike it, likewise.
    Images without features cannot be compared, so these are dropped too.

    Args:
        pool: with features.
        references: pools of evaluation images with features of the same kind, by a name for each.
        config: thresholds, and how neighbours are found.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions; :func:`~dinov2.curate.dedup.decide.decide` says what the tables hold.

    Raises:
        ValueError: a pool has no features, or a name is not made of letters, digits, ``_`` and ``-``.
    """
    for name in references:
        if not NAME.fullmatch(name):
            raise ValueError(f"references must be named by letters, digits, '_' and '-', but one is {name!r}")
    threshold = min(config.threshold, config.reference_reach) if references else config.threshold
    neighbours = yield from search(
        pool, pool, config.search, output, stage="dedup", k=config.neighbours, threshold=threshold
    )
    linked = []
    for name, reference in sorted(references.items()):
        links = yield from search(
            pool, reference, config.search, output, stage=f"dedup-{name}", k=1, threshold=config.reference_threshold
        )
        linked.append(Reference(name, reference, links))
    decisions = yield from _decide(pool, neighbours, tuple(linked), config, output)
    return pool.after(decisions)


def _decide(
    pool: Pool, neighbours: Neighbours, references: tuple[Reference, ...], config: DedupConfig, output: str
) -> Steps[str]:
    """From links to decisions; gives the folder of these."""
    layout = neighbours.searched
    settings = {name: value for name, value in plain(config).items() if name != "search"}
    settings["references"] = [reference.name for reference in references]
    inputs = (layout, neighbours.folder, *(reference.links.folder for reference in references))

    task = Task("all", find_components, (pool, neighbours, references, config))
    components = Step(output, "dedup-components", settings, inputs, (task,))
    yield components
    parts = tuple(part_name(number) for number in range(components.counts().figures["parts"]))

    tasks = tuple(Task(part, choose, (pool, layout, components.folder, part, config)) for part in parts)
    choices = Step(output, "dedup-choices", settings, (components.folder,), tasks, "members of components")
    yield choices

    task = Task("all", assign, (layout, choices.folder, parts))
    chosen = Step(output, "dedup-representatives", None, (choices.folder,), (task,), "members of components")
    yield chosen

    shards = read_layout(layout).names
    tasks = tuple(Task(name, decide, (pool, layout, components.folder, chosen.folder, references)) for name in shards)
    decisions = Step(output, "dedup-decisions", settings, (components.folder, chosen.folder), tasks)
    yield decisions
    return decisions.folder
