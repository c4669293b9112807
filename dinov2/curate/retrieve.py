"""The retrieve stage: chooses the images of a pool that are similar to curated ones, or a balanced sample."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from dinov2.configuration import Config, Count, CountOr0, Rules
from dinov2.curate.clusters import PORTION, ClusterConfig, Clusters, balanced_quotas, choose, k_means, water_fill
from dinov2.curate.lloyd import nearest_centroids
from dinov2.curate.pool import Pool, read_array, read_table, write_decisions
from dinov2.curate.search import Neighbours, SearchConfig, search
from dinov2.curate.search.vectors import PoolVectors, layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, check_names
from dinov2.extras import require

OWN_NUMBER = re.compile(r".+=0*[1-9][0-9]*", re.ASCII)
NOT_CHOSEN = "not retrieved"


@dataclass(frozen=True)
class RetrieveConfig(Config, at="retrieve"):
    """Which images of the pool the retrieve stage chooses."""

    method: Literal["auto", "sample", "cluster", "hierarchical"] = "auto"
    """sample takes the nearest images of each seed. cluster takes some of each cluster that holds seeds. hierarchical
    takes equally many of each cluster of clusters and needs no seeds. auto decides for each set of seeds, and says why;
    without seeds it keeps everything."""
    cluster_below: CountOr0 = 1_000_000
    """auto takes cluster for a set of seeds with fewer images than this."""
    small_pool: CountOr0 = 1_000
    """auto takes sample in a pool with fewer images than this, unless clusters.clusters is given: clusters of so few
    images mix what does not belong together."""
    neighbours: Count = 4
    """sample takes this many images for each seed."""
    neighbours_of: tuple[str, ...] = ()
    """Name sets of seeds that take another number of images, as in imagenet1k=32."""
    min_seeds: Count = 4
    """A cluster counts if it holds at least this many seeds. DINOv2 wants more than three."""
    per_cluster: Count = 10_000
    """cluster takes at most this many images of a cluster."""
    cap: Count = 1_000_000
    """A set of seeds gets at most this many images of clusters. Neighbours are not counted."""
    total: CountOr0 = 0
    """hierarchical draws this many images. 0 draws half of the pool."""
    seed: int = 0
    """This seed decides what is drawn."""
    clusters: ClusterConfig = field(default_factory=ClusterConfig)
    """This is how images are clustered."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """This is how neighbours are found."""

    def rules(self) -> Rules:
        """Entries of ``neighbours_of`` have the form NAME=NUMBER."""
        are_numbers = all(OWN_NUMBER.fullmatch(entry) for entry in self.neighbours_of)
        yield "neighbours_of", are_numbers, "entries NAME=NUMBER with a number of at least 1"

    def own_neighbours(self) -> dict[str, int]:
        """The number of neighbours of each set in ``neighbours_of``."""
        return {name: int(number) for name, _, number in (entry.rpartition("=") for entry in self.neighbours_of)}


def needs_features(config: RetrieveConfig, seeds: Collection[str]) -> bool:
    """Whether the stage reads features of the pool: without seeds, only the hierarchical method does."""
    return bool(seeds) or config.method == "hierarchical"


def retrieve(pool: Pool, seeds: Mapping[str, Pool], config: RetrieveConfig, output: str) -> Steps[Pool]:
    """Keep the images of a pool that sets of curated images ask for (DINOv2, appendix A).

    An image that is asked for more than once is kept once; the column ``times`` says how often. The paper's counts of
    images include the repeats.

    Args:
        pool: images, with features if :func:`needs_features` says so.
        seeds: pools of curated images by name, with features of the same kind.
        config: how each set chooses.
        output: folder or URL of the whole curation.

    Returns:
        The pool after the decisions; :func:`~dinov2.curate.retrieve.decide` says what the tables hold. The step of the
        decisions notes how each set chose, and why.

    Raises:
        ValueError: the method needs seeds and there are none; a pool has no features; or a name has characters other
            than letters, digits, ``_`` and ``-``.
    """
    check_names("seeds", seeds)
    if not seeds and config.method in ("sample", "cluster"):
        raise ValueError(f"seeds: expected at least one set for retrieve.method {config.method}, got none")
    if not seeds and config.method == "auto":
        return pool
    layout = yield from layout_of(pool, "retrieve", output)
    images = _images_of(pool, layout)
    clusters: Clusters | None = None
    chosen: list[Chosen] = []
    if config.method == "hierarchical":
        clusters = yield from k_means(pool, layout, config.clusters, output, "retrieve")
        chosen.append((yield from _hierarchical(pool, clusters, config, output)))
    for name, own in () if config.method == "hierarchical" else sorted(seeds.items()):
        own_layout = yield from layout_of(own, "retrieve", output)
        number = _images_of(own, own_layout)
        if not number:
            chosen.append(Chosen(name, None, "it has no image with features, so it asks for nothing"))
            continue
        method, why = _method(config, number, images)
        if method == "cluster":
            if clusters is None:
                clusters = yield from k_means(pool, layout, config.clusters, output, "retrieve")
            found = yield from _cluster(pool, name, own, own_layout, clusters, config, output)
            if found.folder is not None or config.method == "cluster":
                chosen.append(found)
                continue
            why = found.note
        chosen.append((yield from _sample(pool, name, own, (number, images), why, config, output)))
    folders = tuple((entry.name, entry.folder) for entry in chosen if entry.folder is not None)
    note = "; ".join(f"{entry.name}: {entry.note}" if entry.name else entry.note for entry in chosen)
    inputs = (layout, *(folder for _, folder in folders), *([clusters.assignments] if clusters else []))
    tasks = [Task(shard, decide, (pool, layout, shard, folders, clusters)) for shard in read_layout(layout).names]
    decisions = Step(output, "retrieve-decisions", [name for name, _ in folders], inputs, tasks, note=note)
    yield decisions
    return pool.after(decisions.folder)


class Chosen(NamedTuple):
    """What one set of seeds asks for.

    Attributes:
        name: name of the set; "" for a sample without seeds.
        folder: folder of the table of images; None if the set asks for none.
        note: how the images were chosen, for people.
    """

    name: str
    folder: str | None
    note: str


def _images_of(pool: Pool, layout: str) -> int:
    """The number of images that are still in."""
    places = read_layout(layout)
    if not pool.decisions:
        return places.rows
    return sum(int(pool.kept(shard).sum()) for shard in places.names)


def _method(config: RetrieveConfig, seeds: int, images: int) -> tuple[str, str]:
    """How a set of so many seeds chooses among so many images, and the reason if this was decided for it."""
    if config.method != "auto":
        return config.method, ""
    if seeds >= config.cluster_below:
        return "sample", ""
    if seeds < config.min_seeds:
        return "sample", f"no cluster can hold retrieve.min_seeds {config.min_seeds} of its {_counted(seeds)}"
    if not config.clusters.clusters and images < config.small_pool:
        return "sample", f"clusters of {images:,} images are too coarse (retrieve.small_pool {config.small_pool:,})"
    return "cluster", ""


def _counted(seeds: int) -> str:
    return f"{seeds:,} seed{'s' if seeds != 1 else ''}"


def _part(chosen: int, images: int) -> str:
    return ", which are all images" if chosen == images > 0 else f": {chosen:,} of {images:,} images"


def _sample(
    pool: Pool, name: str, seeds: Pool, sizes: tuple[int, int], why: str, config: RetrieveConfig, output: str
) -> Steps[Chosen]:
    """Choose the nearest images of each seed. ``sizes`` are the numbers of seeds and of images."""
    k = config.own_neighbours().get(name, config.neighbours)
    found = yield from search(seeds, pool, config.search, output, stage=f"retrieve-{name}", k=k)
    hits = Step(output, f"retrieve-{name}-hits", None, (found.folder,), [Task("all", write_hits, (found,))])
    yield hits
    number, images = sizes
    note = f"{why}, so " if why else ""
    note += f"the {k:,} nearest images of each of {_counted(number)} were taken"
    return Chosen(name, hits.folder, note + _part(hits.counts().rows_out, images))


def _cluster(
    pool: Pool, name: str, seeds: Pool, layout: str, clusters: Clusters, config: RetrieveConfig, output: str
) -> Steps[Chosen]:
    """Choose some images of each cluster that holds enough seeds."""
    assert seeds.features is not None  # without features there are no clusters
    settings = [config.min_seeds, config.per_cluster, config.cap]
    inputs = (clusters.centroids, clusters.assignments, seeds.features, *seeds.decisions, layout)
    task = Task("all", quotas_by_seeds, (clusters, seeds, layout, config))
    quotas = Step(output, f"retrieve-{name}-quotas", settings, inputs, [task], "clusters")
    yield quotas
    counts = quotas.counts()
    number, images = counts.figures["seeds"], _images_of(pool, clusters.layout)
    holding = f"{counts.rows_out:,}" if counts.rows_out else "none"
    note = f"{holding} of {counts.rows_in:,} clusters hold at least {config.min_seeds} of its {_counted(number)}"
    if not counts.rows_out:
        return Chosen(name, None, note)
    got = counts.figures["images"]
    note += _part(got, images) + (", as many as retrieve.cap allows" if got == config.cap < images else "")
    return Chosen(name, (yield from _draw(f"retrieve-{name}", clusters, quotas.folder, config, output)), note)


def _hierarchical(pool: Pool, clusters: Clusters, config: RetrieveConfig, output: str) -> Steps[Chosen]:
    """Choose a balanced share of each cluster, from the top of the hierarchy down."""
    inputs = (clusters.assignments, *([clusters.upper] if clusters.upper else []))
    task = Task("all", quotas_of_hierarchy, (clusters, config))
    quotas = Step(output, "retrieve-balanced-quotas", config.total, inputs, [task], "clusters")
    yield quotas
    counts = quotas.counts()
    lowest, images = counts.rows_in, _images_of(pool, clusters.layout)
    note = f"{counts.figures['images']:,} of {images:,} images, shared out over {lowest:,} clusters"
    if config.total > images:
        note += f"; retrieve.total {config.total:,} is more than there are"
    if coarse := [f"{level:,}" for level in config.clusters.levels if level >= lowest]:
        note += f"; levels of {', '.join(coarse)} clusters change nothing above so few"
    return Chosen("", (yield from _draw("retrieve-balanced", clusters, quotas.folder, config, output)), note)


def _draw(name: str, clusters: Clusters, quotas: str, config: RetrieveConfig, output: str) -> Steps[str]:
    inputs = (clusters.assignments, quotas)
    task = Task("all", choose, (clusters, quotas, config.seed, name))
    drawn = Step(output, f"{name}-drawn", config.seed, inputs, [task])
    yield drawn
    hits = Step(output, f"{name}-hits", None, (drawn.folder,), [Task("all", write_drawn, (drawn.folder,))])
    yield hits
    return hits.folder


def write_hits(output: Output, found: Neighbours) -> Counts:
    """Task: write for every image found its ``position``, ``times``, its nearest ``seed`` (position in the set; among
    equals, the first) and the ``cosine`` to it, sorted by position."""
    layout = found.query_layout()
    seeds, positions, cosines = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for shard in layout.names:
        part = found.read(shard)
        seeds.append(part.row + layout.range_of(shard)[0])
        positions.append(part.neighbour)
        cosines.append(part.cosine)
    seed, position, cosine = np.concatenate(seeds), np.concatenate(positions), np.concatenate(cosines)
    order = np.lexsort((seed, -cosine, position))
    once, first, times = np.unique(position[order], return_index=True, return_counts=True)
    nearest = order[first]
    arrow = require("pyarrow", extra="curate", purpose="curation")
    output.write_table(
        arrow.table({"position": once, "times": times, "seed": seed[nearest], "cosine": cosine[nearest]})
    )
    return Counts(len(seed), len(once), {}, {"found more than once": int((times > 1).sum())})


def quotas_by_seeds(output: Output, clusters: Clusters, seeds: Pool, layout: str, config: RetrieveConfig) -> Counts:
    """Task: write the quota of each cluster: min(its size, ``per_cluster``) if it holds ``min_seeds`` seeds, else 0.

    If the sum exceeds ``cap``, all quotas are cut at one level, so that the sum is ``cap``.
    """
    centroids, places = clusters.read_centroids(), read_layout(layout)
    sizes, held = sizes_of(clusters, len(centroids)), np.zeros(len(centroids), np.int64)
    vectors = PoolVectors(seeds, places)
    for start in range(0, places.rows if sizes.any() else 0, PORTION):  # centroids of an empty pool are none
        block, _ = vectors.block(start, min(start + PORTION, places.rows))
        if len(block):
            held += np.bincount(nearest_centroids(block, centroids).cluster, minlength=len(centroids))
    wanted = np.where(held >= config.min_seeds, np.minimum(sizes, config.per_cluster), 0)
    quotas = water_fill(wanted, config.cap)
    output.write_array(quotas)
    return Counts(len(held), int((quotas > 0).sum()), {}, {"images": int(quotas.sum()), "seeds": int(held.sum())})


def quotas_of_hierarchy(output: Output, clusters: Clusters, config: RetrieveConfig) -> Counts:
    """Task: write a balanced quota for each cluster."""
    sizes = sizes_of(clusters, len(clusters.read_centroids()))
    quotas = balanced_quotas(sizes, clusters.read_parents(), config.total or int(sizes.sum()) // 2)
    output.write_array(quotas)
    return Counts(len(sizes), int((quotas > 0).sum()), {}, {"images": int(quotas.sum())})


def sizes_of(clusters: Clusters, k: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of images of each cluster [k]."""
    sizes = np.zeros(k, np.int64)
    for shard in read_layout(clusters.layout).names:
        cluster = clusters.read_clusters(shard)
        sizes += np.bincount(cluster[cluster >= 0], minlength=k)
    return sizes


def write_drawn(output: Output, drawn: str) -> Counts:
    """Task: write the drawn images in the form of :func:`write_hits`, without seeds."""
    arrow = require("pyarrow", extra="curate", purpose="curation")
    position = np.array(read_array(drawn, "all"))
    nothing = {"seed": arrow.nulls(len(position), "int64"), "cosine": arrow.nulls(len(position), "float32")}
    output.write_table(arrow.table({"position": position, "times": np.ones_like(position), **nothing}))
    return Counts(len(position), len(position))


def decide(
    output: Output,
    pool: Pool,
    layout: str,
    shard: str,
    chosen: tuple[tuple[str, str], ...],
    clusters: Clusters | None,
) -> Counts:
    """Task: write decisions on a shard, with these columns:

    ====================  =========  ==================================================================================
    ``times``             int64      how often the row was asked for
    ``seed_set``          text       the first set that asked for it; null for none, and in a hierarchical sample
    ``seed``              int64      position in the set of the nearest seed; null for images drawn from clusters
    ``cosine``            float32    cosine to that seed; null for images drawn from clusters
    ``cluster``           int32      cluster of the row, -1 for none; null if there are no clusters
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
