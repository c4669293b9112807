"""The configuration of a curation, and all its stages in order: section 3 of DINOv2 as one generator of steps."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dinov2.configuration import Config, Rules, to_json
from dinov2.curate.collect import CollectConfig, collect
from dinov2.curate.dedup import DedupConfig, dedup
from dinov2.curate.download import DownloadConfig, download
from dinov2.curate.early import NO_SOURCE, check_early
from dinov2.curate.embed import BUILT_IN, EmbedConfig, embed
from dinov2.curate.engines import EngineConfig
from dinov2.curate.extract import ExtractConfig, extract
from dinov2.curate.materialize import MaterializeConfig, materialize
from dinov2.curate.overlaps import OverlapWarning, check_overlaps
from dinov2.curate.pool import Pool
from dinov2.curate.retrieve import RetrieveConfig, needs_features, retrieve
from dinov2.curate.screen import ScreenConfig, screen
from dinov2.curate.steps import NAME, Steps
from dinov2.data.files import quoted
from dinov2.data.outputs import CONFIG, forget_final_set, save_final_set
from dinov2.data.shards.storage import Storage

STAGES = ("extract", "download", "collect", "screen", "embed", "dedup", "retrieve", "materialize")


class EmptySetWarning(UserWarning):
    """A set of seeds or evaluation images has no image that can be used."""


@dataclass(frozen=True)
class CurateConfig(Config):
    """What ``dinov2 curate`` does. Paths may be URLs of fsspec, such as ``s3://bucket/pool``."""

    output: str = "curated"
    """Everything is written into this folder. Each stage makes folders in it that are named after its settings."""
    pages: str | None = None
    """Take images from the web pages in this folder: HTML, WARC or WAT. Or give links, or images."""
    links: str | None = None
    """Download the links in this folder: Parquet tables with a column url."""
    images: str | None = None
    """Take the image files in this folder, nested in any way, or its tar shards with their index, or the final set of
    the curation in it."""
    evaluation_sets: tuple[str, ...] = ()
    """Models will be tested on the images in these folders: nothing that looks like them stays in the pool."""
    seeds: tuple[str, ...] = ()
    """These folders hold curated images: images like these are retrieved from the pool."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """The extract stage takes links from pages."""
    download: DownloadConfig = field(default_factory=DownloadConfig)
    """The download stage fetches images."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    """The collect stage puts files into shards."""
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    """The screen stage drops images that are unfit for training."""
    embed_copies: EmbedConfig = field(default_factory=EmbedConfig)
    """These features find copies."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """The dedup stage keeps one of each group of near-copies."""
    embed: EmbedConfig = field(default_factory=lambda: EmbedConfig(model="colour-texture"))
    """These features decide which images are retrieved. Without seeds they are computed for the method hierarchical
    only."""
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    """The retrieve stage chooses images that are like the seeds, or a balanced sample."""
    materialize: MaterializeConfig = field(default_factory=MaterializeConfig)
    """The materialize stage writes the final set."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engine decides where tasks run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.output, str):
            object.__setattr__(self, "output", self.output.rstrip("/") or self.output[:1])

    def rules(self) -> Rules:
        """A curation has one source. The folders of its sets have different names, which settings may name."""
        for name in ("output", "pages", "links", "images"):
            yield name, getattr(self, name) != "", "a folder or URL"
        given = [name for name in ("pages", "links", "images") if getattr(self, name) is not None]
        for name in given[1:]:
            yield name, False, f"None with {given[0]}, because a curation has one source"
        for name in ("evaluation_sets", "seeds"):
            paths = getattr(self, name)
            yield name, len(set_names(paths)) == len(paths), "folders whose last names differ"
            are_names = all(NAME.fullmatch(last) for last in set_names(paths))
            yield name, are_names, "folders whose last names have only letters, digits, '_' and '-'"
        seeds = set_names(self.seeds)
        of_seeds = f"names of sets of seeds ({', '.join(seeds) or 'there are none'})"
        yield "materialize.as_is", {*self.materialize.as_is} <= {"*", *seeds}, f"{of_seeds}, or *"
        if seeds:
            yield "retrieve.neighbours_of", {*self.retrieve.own_neighbours()} <= {*seeds}, f"{of_seeds}, or nothing"


def set_names(paths: Sequence[str]) -> dict[str, str]:
    """The paths, by the name of their last folder."""
    return {PurePosixPath(path).name: path for path in paths}


@dataclass(frozen=True)
class Curated:
    """The result of a curation.

    Attributes:
        root: folder of the tar shards to pretrain on, ``--data.root``.
        chosen: the pool without the rows that were dropped.
    """

    root: str
    chosen: Pool


def curate(config: CurateConfig, check: Collection[str] = STAGES) -> Steps[Curated]:
    """All steps from the source to the final shards.

    Args:
        config: what to do.
        check: before the first step, check what these stages need: sets, models, plug-ins and packages.

    Raises:
        ValueError, FileNotFoundError, ImportError: something is missing or wrong; the message names the setting.
    """
    _check_folders(config)
    check_early(config, check)
    output = config.output
    pool = yield from source(config)
    tests = yield from collected_sets(config, "evaluation_sets")
    seeds = yield from collected_sets(config, "seeds")
    pool = yield from screen(pool, config.screen, output)

    pool = yield from embed(pool, config.embed_copies, output, "embed_copies")
    tests = yield from embedded_sets(config, "evaluation_sets", tests, config.embed_copies, "embed_copies")
    pool = yield from dedup(pool, tests, resolved(config).dedup, output)

    if needs_features(config.retrieve, config.seeds):
        pool = yield from embed(pool, config.embed, output, "embed")
    seeds = yield from embedded_sets(config, "seeds", seeds, config.embed, "embed")
    pool = yield from retrieve(pool, seeds, config.retrieve, output)
    root = yield from materialize(pool, seeds, config.materialize, output)
    save_final_set(output, to_json(config), PurePosixPath(root).name)
    return Curated(root, pool)


def resolved(config: CurateConfig) -> CurateConfig:
    """The configuration with the check of links that ``dedup.check auto`` stands for: built-in features need one."""
    if config.dedup.check != "auto":
        return config
    checked = dataclasses.replace(config.dedup, check="pictures" if config.embed_copies.model in BUILT_IN else "none")
    return dataclasses.replace(config, dedup=checked)


def _check_folders(config: CurateConfig) -> None:
    check_overlaps(config.images, config.evaluation_sets, config.seeds, config.materialize.as_is)


def source(config: CurateConfig) -> Steps[Pool]:
    """Make the pool of all images from the source that the configuration names."""
    if config.images is not None:
        pool = yield from collect(config.images, config.collect, config.output)
        return pool
    links = config.links
    if config.pages is not None:
        links = yield from extract(config.pages, config.extract, config.output)
    if links is None:
        raise ValueError(NO_SOURCE)
    pool = yield from download(links, config.download, config.output)
    return pool


def collected_sets(config: CurateConfig, field: str) -> Steps[dict[str, Pool]]:
    """Make the pools of ``seeds`` or ``evaluation_sets``, by name."""
    pools = {}
    for name, path in set_names(getattr(config, field)).items():
        try:
            pools[name] = yield from collect(path, config.collect, config.output)
        except ValueError as error:
            raise ValueError(f"{field}: {str(error).removeprefix('images: ')}") from error
    return pools


def embedded_sets(
    config: CurateConfig, field: str, pools: dict[str, Pool], settings: EmbedConfig, at: str
) -> Steps[dict[str, Pool]]:
    """Add features to the pools of ``seeds`` or ``evaluation_sets``. ``at`` is where the settings stand in the
    configuration."""
    embedded = {}
    for name, pool in pools.items():
        embedded[name] = yield from embed(pool, settings, config.output, at)
        if not any(embedded[name].kept(shard).any() for shard in pool.shards()):
            path = quoted(set_names(getattr(config, field))[name])
            effect = "looked for in the pool" if field == "evaluation_sets" else "retrieved for it"
            warnings.warn(
                f"{field}: {path} has no image that can be used, so nothing is {effect}",
                EmptySetWarning,
                stacklevel=2,
            )
    return embedded


def only(steps: Steps[Curated], stage: str) -> Steps[None]:
    """The steps of one stage, as far as the earlier steps are done; none if the curation has no such stage, as one
    without seeds has no retrieval.

    Raises:
        ValueError: no step of the stage can run, because an earlier step is not done; the message names it.
    """
    begun = False
    for step in steps:
        if step.stage == stage:
            begun = True
            yield step
        elif missing := len({task.shard for task in step.tasks} - step.finished()):
            if begun or STAGES.index(step.stage) > STAGES.index(stage):
                return
            raise ValueError(
                f"{stage} needs all shards of {step.name}, but {missing} of {len(step.tasks)} are missing: run"
                f" dinov2 curate {step.stage} first"
            )


def save_config(config: CurateConfig) -> None:
    """Write ``config.json`` into the output. A later curation with the same output replaces it. The output has no final
    set until the curation ends.

    Raises:
        ValueError: the folders cannot be used together; nothing is written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OverlapWarning)  # the curation says it
        _check_folders(config)
    storage = Storage(config.output)
    forget_final_set(config.output)
    with storage.replace(f"{storage.root}/{CONFIG}") as file:
        file.write(json.dumps(to_json(config), indent=1).encode())
