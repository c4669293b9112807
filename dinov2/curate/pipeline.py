"""The configuration of a curation, and all its stages in order: section 3 of DINOv2 as one generator of steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dinov2.curate.collect import CollectConfig, collect
from dinov2.curate.dedup import DedupConfig, dedup
from dinov2.curate.download import DownloadConfig, download
from dinov2.curate.embed import EmbedConfig, embed
from dinov2.curate.engines import EngineConfig
from dinov2.curate.extract import ExtractConfig, extract
from dinov2.curate.materialize import MaterializeConfig, materialize
from dinov2.curate.pool import Pool
from dinov2.curate.retrieve import RetrieveConfig, retrieve
from dinov2.curate.screen import ScreenConfig, screen
from dinov2.curate.steps import Steps, plain
from dinov2.data.shards.storage import Storage

STAGES = ("extract", "download", "collect", "screen", "embed", "dedup", "retrieve", "materialize")


@dataclass(frozen=True)
class CurateConfig:
    """What ``dinov2 curate`` does. Paths may be URLs of fsspec, such as ``s3://bucket/pool``."""

    output: str = "curated"
    """Folder of everything that is written. Stages own folders in it, named after their settings."""
    pages: str | None = None
    """Folder of web pages to take images from: HTML, WARC or WAT. Or give links, or images."""
    links: str | None = None
    """Folder of Parquet tables of links with a column url, to download."""
    images: str | None = None
    """Folder of image files of any nesting, or of tar shards with their index."""
    evaluation_sets: tuple[str, ...] = ()
    """Folders of images that models will be tested on: nothing that looks like them stays in the pool."""
    seeds: tuple[str, ...] = ()
    """Folders of curated images: the pool's images like these are retrieved."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    embed_copies: EmbedConfig = field(default_factory=EmbedConfig)
    """The features by which copies are found."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    embed: EmbedConfig = field(default_factory=lambda: EmbedConfig(model="colour-texture"))
    """The features by which images are retrieved."""
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    materialize: MaterializeConfig = field(default_factory=MaterializeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        sources = {name: getattr(self, name) for name in ("pages", "links", "images")}
        if sum(source is not None for source in sources.values()) > 1:
            given = ", ".join(f"{name} {source}" for name, source in sources.items() if source is not None)
            raise ValueError(f"one of pages, links and images must be given, but there are {given}")
        object.__setattr__(self, "output", self.output.rstrip("/") or "/")
        for name in ("evaluation_sets", "seeds"):
            set_names(getattr(self, name), name)


def set_names(paths: Sequence[str], argument: str) -> dict[str, str]:
    """Paths by the name of their last folder.

    Raises:
        ValueError: two have the same name.
    """
    names = {PurePosixPath(path).name: path for path in paths}
    if len(names) != len(paths):
        raise ValueError(f"{argument} must end in folders of different names, but are {', '.join(paths)}")
    return names


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


def save_config(config: CurateConfig) -> None:
    """Write ``config.json`` into the output; of several curations with one output, it is the last one's."""
    storage = Storage(config.output)
    with storage.replace(f"{storage.root}/config.json") as file:
        file.write(json.dumps(plain(config), indent=1).encode())
