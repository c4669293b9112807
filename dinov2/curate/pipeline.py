"""All stages in order: section 3 of DINOv2 as one generator of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dinov2.curate.collect import collect
from dinov2.curate.config import CurateConfig, set_names
from dinov2.curate.dedup import dedup
from dinov2.curate.download import download
from dinov2.curate.embed import EmbedConfig, embed
from dinov2.curate.extract import extract
from dinov2.curate.materialize import materialize
from dinov2.curate.pool import Pool
from dinov2.curate.retrieve import retrieve
from dinov2.curate.screen import screen
from dinov2.curate.steps import Steps

STAGES = ("extract", "download", "collect", "screen", "embed", "dedup", "retrieve", "materialize")


@dataclass(frozen=True)
class Curated:
    """What a curation has made.

    Attributes:
        root: tar shards to pretrain on, ``--data.root``.
        chosen: the pool's rows that are in it.
    """

    root: str
    chosen: Pool


def curate(config: CurateConfig) -> Steps[Curated]:
    """Every step from the source to the final shards."""
    output = config.output
    pool = yield from source(config)
    pool = yield from screen(pool, config.screen, output)

    pool = yield from embed(pool, config.embed_copies, output)
    tests = yield from embedded_sets(config, set_names(config.evaluation_sets, "evaluation_sets"), config.embed_copies)
    pool = yield from dedup(pool, tests, config.dedup, output)

    pool = yield from embed(pool, config.embed, output)
    seeds = yield from embedded_sets(config, set_names(config.seeds, "seeds"), config.embed)
    pool = yield from retrieve(pool, seeds, config.retrieve, output)
    root = yield from materialize(pool, seeds, config.materialize, output)
    return Curated(root, pool)


def source(config: CurateConfig) -> Steps[Pool]:
    """The pool of all images, from wherever they are."""
    if config.images is not None:
        pool = yield from collect(config.images, config.collect, config.output)
        return pool
    links = config.links
    if config.pages is not None:
        links = yield from extract(config.pages, config.extract, config.output)
    if links is None:
        raise ValueError("one of pages, links and images must be given, but there is none of them")
    pool = yield from download(links, config.download, config.output)
    return pool


def embedded_sets(config: CurateConfig, paths: Mapping[str, str], settings: EmbedConfig) -> Steps[dict[str, Pool]]:
    """Sets of images beside the pool, with features, by name."""
    pools = {}
    for name, path in paths.items():
        images = yield from collect(path, config.collect, config.output)
        pools[name] = yield from embed(images, settings, config.output)
    return pools


def only(steps: Steps[Curated], stage: str) -> Steps[None]:
    """The steps of one stage, as far as those before it are done.

    Raises:
        ValueError: there is nothing that can be done, as a step before is not; the message names it.
    """
    begun = False
    for step in steps:
        if step.stage == stage:
            begun = True
            yield step
        elif missing := len({task.shard for task in step.tasks} - step.finished()):
            if begun:
                return
            raise ValueError(
                f"{stage} needs {step.name}, of which {missing} of {len(step.tasks)} shards are missing: run"
                f" dinov2 curate {step.stage} first"
            )
