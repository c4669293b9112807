"""The configuration of a curation: where images come from, and the settings of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dinov2.curate.collect import CollectConfig
from dinov2.curate.dedup import DedupConfig
from dinov2.curate.download import DownloadConfig
from dinov2.curate.embed import EmbedConfig
from dinov2.curate.engines import EngineConfig
from dinov2.curate.extract import ExtractConfig
from dinov2.curate.materialize import MaterializeConfig
from dinov2.curate.retrieve import RetrieveConfig
from dinov2.curate.screen import ScreenConfig


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
