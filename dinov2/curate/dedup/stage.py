"""The dedup stage keeps one image of each group of near-copies, and drops images that are near an evaluation image."""

from __future__ import annotations

from collections.abc import Mapping

from dinov2.configuration import to_json
from dinov2.curate.copies.sketches import sketched
from dinov2.curate.dedup.choosing import assign, choose
from dinov2.curate.dedup.config import DedupConfig
from dinov2.curate.dedup.deciding import decide
from dinov2.curate.dedup.grouping import Reference, find_components, part_name
from dinov2.curate.dedup.links import checked_links
from dinov2.curate.pool import Pool
from dinov2.curate.search import Neighbours, search
from dinov2.curate.search.vectors import read_layout
from dinov2.curate.steps import Step, Steps, Task, check_names


def dedup(pool: Pool, references: Mapping[str, Pool], config: DedupConfig, output: str) -> Steps[Pool]:
    """Keep one image of each group of near-copies, and none that is near a reference image (appendix A of DINOv2).

    Each image is linked to its nearest neighbours above a threshold. If ``config.check`` is "pictures", a link counts
    only if the two images show the same picture. Images connected by links form a component. A component that is linked
    to a reference image is dropped as a whole. Each other component keeps its largest image; among equals, the first. A
    guard finds the members that are unlike the kept image; of these the largest is kept too, and so on. Images without
    features cannot be compared, so they are dropped.

    Args:
        pool: images with features.
        references: pools of evaluation images by name, with features of the same kind.
        config: thresholds, whether links are checked ("auto" is "none" here), and how neighbours are found.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions; :func:`~dinov2.curate.dedup.deciding.decide` says what the tables hold.

    Raises:
        ValueError: a pool has no features, or a name is not made of letters, digits, ``_`` and ``-``.
    """
    check_names("references", references)
    checks = config.checks_pictures
    threshold = config.threshold
    if references and not checks:
        threshold = min(threshold, config.reference_reach)
    neighbours = yield from search(
        pool, pool, config.search, output, stage="dedup", k=config.neighbours, threshold=threshold
    )
    if checks:
        pool = yield from sketched(pool, neighbours.query_layout(), output, "dedup")
        neighbours = yield from checked_links(neighbours, pool, pool, output, "dedup")
    linked = []
    for name, reference in sorted(references.items()):
        stage, k = f"dedup-{name}", config.neighbours if checks else 1
        links = yield from search(
            pool, reference, config.search, output, stage=stage, k=k, threshold=config.reference_threshold
        )
        if checks:
            reference = yield from sketched(reference, links.layout(), output, stage)
            links = yield from checked_links(links, pool, reference, output, stage, config.plain_threshold)
        linked.append(Reference(name, reference, links))
    decisions = yield from _decide(pool, neighbours, tuple(linked), config, output)
    return pool.after(decisions)


def _decide(
    pool: Pool,
    neighbours: Neighbours,
    references: tuple[Reference, ...],
    config: DedupConfig,
    output: str,
) -> Steps[str]:
    """Steps from links to decisions; the value is the folder of the decisions."""
    layout = neighbours.searched
    settings = {name: value for name, value in to_json(config).items() if name != "search"}
    settings["references"] = [reference.name for reference in references]
    inputs = (layout, neighbours.folder, *(reference.links.folder for reference in references))

    task = Task("all", find_components, (pool, neighbours, references, config))
    components = Step(output, "dedup-components", settings, inputs, (task,))
    yield components
    parts = tuple(part_name(number) for number in range(components.counts().figures["parts"]))

    tasks = tuple(Task(part, choose, (pool, layout, components.folder, part, config)) for part in parts)
    inputs = (components.folder, *([pool.sketches] if config.checks_pictures and pool.sketches else []))
    choices = Step(output, "dedup-choices", settings, inputs, tasks, "members of components")
    yield choices

    task = Task("all", assign, (layout, choices.folder, parts))
    chosen = Step(output, "dedup-representatives", None, (choices.folder,), (task,), "members of components")
    yield chosen

    shards = read_layout(layout).names
    tasks = tuple(Task(name, decide, (pool, layout, components.folder, chosen.folder, references)) for name in shards)
    decisions = Step(output, "dedup-decisions", settings, (components.folder, chosen.folder), tasks)
    yield decisions
    return decisions.folder
