"""Retrieval as steps: each set of seeds chooses, then every row of the pool is told whether it was chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dinov2.curate.clusters import Clusters, choose, k_means
from dinov2.curate.pool import Pool
from dinov2.curate.retrieve.config import RetrieveConfig
from dinov2.curate.retrieve.decide import decide
from dinov2.curate.retrieve.quotas import quotas_by_seeds, quotas_of_hierarchy, write_drawn
from dinov2.curate.retrieve.sampled import write_hits
from dinov2.curate.search import search
from dinov2.curate.search.layout import layout_of, read_layout
from dinov2.curate.steps import Step, Steps, Task

NAME = re.compile(r"[\w-]+", re.ASCII)


def retrieve(pool: Pool, seeds: Mapping[str, Pool], config: RetrieveConfig, output: str) -> Steps[Pool]:
    """Keep the images of a pool that sets of curated images ask for (DINOv2, appendix A).

    An image that is asked for more than once is kept once; the column ``times`` says how often. Where the paper counts
    images, it counts the repeated ones.

    Args:
        pool: with features.
        seeds: pools of curated images with features of the same kind, by a name for each.
        config: how each set chooses.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions; :func:`~dinov2.curate.retrieve.decide.decide` says what the tables hold.

    Raises:
        ValueError: a method needs seeds, of which there are none; a pool has no features; or a name is not made of
            letters, digits, ``_`` and ``-``.
    """
    for name in seeds:
        if not NAME.fullmatch(name):
            raise ValueError(f"seeds must be named by letters, digits, '_' and '-', but one is {name!r}")
    if not seeds and config.method in ("sample", "cluster"):
        raise ValueError(f"retrieve.method {config.method} needs seeds, but there are none")
    if not seeds and config.method == "auto":
        return pool
    layout = yield from layout_of(pool, "retrieve", output)
    clusters: Clusters | None = None
    chosen: list[tuple[str, str]] = []
    if config.method == "hierarchical":
        clusters = yield from k_means(pool, layout, config.clusters, output, "retrieve")
        chosen = [("", (yield from _hierarchical(pool, clusters, config, output)))]
    else:
        for name, own in sorted(seeds.items()):
            own_layout = yield from layout_of(own, "retrieve", output)
            if config.method == "sample" or (
                config.method == "auto" and read_layout(own_layout).rows >= config.cluster_below
            ):
                chosen.append((name, (yield from _sample(pool, name, own, config, output))))
                continue
            if clusters is None:
                clusters = yield from k_means(pool, layout, config.clusters, output, "retrieve")
            chosen.append((name, (yield from _cluster(name, own, own_layout, clusters, config, output))))
    inputs = (layout, *(folder for _, folder in chosen), *([clusters.assignments] if clusters else []))
    tasks = [Task(shard, decide, (pool, layout, shard, tuple(chosen), clusters)) for shard in read_layout(layout).names]
    decisions = Step(output, "retrieve-decisions", [name for name, _ in chosen], inputs, tasks)
    yield decisions
    return pool.after(decisions.folder)


def _sample(pool: Pool, name: str, seeds: Pool, config: RetrieveConfig, output: str) -> Steps[str]:
    """The nearest images of each seed."""
    k = config.own_neighbours().get(name, config.neighbours)
    found = yield from search(seeds, pool, config.search, output, stage=f"retrieve-{name}", k=k)
    hits = Step(output, f"retrieve-{name}-hits", None, (found.folder,), [Task("all", write_hits, (found,))])
    yield hits
    return hits.folder


def _cluster(
    name: str, seeds: Pool, layout: str, clusters: Clusters, config: RetrieveConfig, output: str
) -> Steps[str]:
    """Some images of each cluster that holds enough seeds."""
    assert seeds.features is not None  # or there were no clusters
    settings = [config.min_seeds, config.per_cluster, config.cap]
    inputs = (clusters.centroids, clusters.assignments, seeds.features, *seeds.decisions, layout)
    task = Task("all", quotas_by_seeds, (clusters, seeds, layout, config))
    quotas = Step(output, f"retrieve-{name}-quotas", settings, inputs, [task], "clusters")
    yield quotas
    return (yield from _draw(f"retrieve-{name}", clusters, quotas.folder, config, output))


def _hierarchical(pool: Pool, clusters: Clusters, config: RetrieveConfig, output: str) -> Steps[str]:
    """As many images of each cluster as there is room for, from the top of the hierarchy down."""
    inputs = (clusters.assignments, *([clusters.upper] if clusters.upper else []))
    task = Task("all", quotas_of_hierarchy, (clusters, config))
    quotas = Step(output, "retrieve-balanced-quotas", config.total, inputs, [task], "clusters")
    yield quotas
    return (yield from _draw("retrieve-balanced", clusters, quotas.folder, config, output))


def _draw(name: str, clusters: Clusters, quotas: str, config: RetrieveConfig, output: str) -> Steps[str]:
    inputs = (clusters.assignments, quotas)
    task = Task("all", choose, (clusters, quotas, config.seed, name))
    drawn = Step(output, f"{name}-drawn", config.seed, inputs, [task])
    yield drawn
    hits = Step(output, f"{name}-hits", None, (drawn.folder,), [Task("all", write_drawn, (drawn.folder,))])
    yield hits
    return hits.folder
