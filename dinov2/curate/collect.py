"""The collect stage: makes a pool of images on your storage, which are files in folders or tar shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dinov2.configuration import Config, Count
from dinov2.curate.pool import Pool
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.data.decoding import IMAGE_EXTENSIONS
from dinov2.data.files import escaped
from dinov2.data.shards import ShardImage, write_shard
from dinov2.data.shards.storage import Storage

UNREADABLE, TOO_LARGE = "cannot be opened", "file too large"


@dataclass(frozen=True)
class CollectConfig(Config, at="collect"):
    """How the collect stage puts files into shards."""

    shard_size: Count = 10_000
    """A shard holds this many files at most, and a quarter of it at least, so that few shards change when files come
    or go later."""
    max_bytes: Count = 50_000_000
    """Files with more bytes than this are left out."""


def collect(images: str, config: CollectConfig, output: str) -> Steps[Pool]:
    r"""Make a pool of the images in a folder or under a URL.

    Tar shards with their index (``dinov2 index`` writes one) are used where they are, without any step. In other
    folders, of any nesting, all files with the name of an image go into shards in the order of their paths. Hidden
    files and folders are left out. Files that are no images, or that cannot be read (broken links, pipes), are counted
    and left out. Links to folders are followed, and each folder counts once. If a name is not UTF-8, the column
    ``path`` has its other bytes as ``\xNN``; :func:`~dinov2.data.unescaped` returns the name.

    Args:
        images: folder or URL.
        config: size of shards and limit of files.
        output: folder or URL of the whole curation.

    Raises:
        ValueError: there are no images.
    """
    storage = Storage(images)
    if storage.shards():
        if missing := storage.shards().keys() - storage.indices().keys():
            raise ValueError(
                f"images: expected an index for each tar, got {len(missing)} tars without one under {images!r}:"
                f" write them with dinov2 index {images}"
            )
        return Pool(images)
    sizes = {path: size for path, size in storage.find().items() if _is_image(path)}
    paths = sorted(sizes)
    if not paths:
        raise ValueError(f"images: expected a folder of images or of tar shards, got {images!r}, which has neither")
    stamps = storage.stamps(paths)
    tasks = [
        Task(
            f"{number:05d}",
            _write,
            (images, tuple(paths[start:stop]), config),
            rows=stop - start,
            content=partial(_content, stamps[start:stop]),
        )
        for number, (start, stop) in enumerate(cuts(paths, config.shard_size))
    ]
    listing = digest([[f"{storage.root}/{path}", stamp] for path, stamp in zip(paths, stamps, strict=True)])
    step = Step(output, "collect-images", config, (images, listing), tasks, "files")
    yield step
    return Pool(step.folder)


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_EXTENSIONS) and not any(part.startswith(".") for part in path.split("/"))


def _write(output: Output, images: str, paths: tuple[str, ...], config: CollectConfig) -> Counts:
    """Task: write one shard."""
    storage, dropped = Storage(images), Counter[str]()

    def files() -> Iterator[ShardImage]:
        for path in paths:
            output.advance()
            full = f"{storage.root}/{path}"
            try:
                entry = storage.filesystem.info(full)
                if entry["type"] != "file":  # a pipe would block the read
                    dropped[UNREADABLE] += 1
                    continue
                if entry["size"] > config.max_bytes:
                    dropped[TOO_LARGE] += 1
                    continue
                content = storage.filesystem.cat_file(full)
            except OSError:
                dropped[UNREADABLE] += 1
                continue
            yield ShardImage(key_of(path), content, {"path": escaped(path)})

    report = write_shard(files(), output.folder, int(output.shard))
    return Counts(len(paths), report.images, dict(sorted((dropped + report.skipped).items())))


def _content(stamps: list[str], images: str, paths: tuple[str, ...], config: CollectConfig) -> str:
    """A digest of the files of a shard, which changes with each of them."""
    return digest([Storage(images).root, paths, stamps], 32)


def cuts(paths: Sequence[str], size: int) -> Iterator[tuple[int, int]]:
    """Where sorted paths are cut into shards of at most ``size`` files, (start, stop) each.

    All but the last have at least a quarter of it. A shard ends, within these limits, before the path of the least
    digest. So files that come or go in one place move the ends of the shards there, and of hardly any other.

    Example:
        >>> from dinov2.curate.collect import cuts
        >>> list(cuts(["a", "b", "c", "d", "e"], 5)), list(cuts([], 5))
        ([(0, 5)], [])
    """
    start = 0
    while len(paths) - start > size:
        places = range(start + (size + 3) // 4, start + size + 1)
        stop = min(places, key=lambda place: key_of(paths[place]))
        yield start, stop
        start = stop
    if start < len(paths):
        yield start, len(paths)


def key_of(name: str) -> str:
    """32 hexadecimal digits that identify a path or a URL."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
