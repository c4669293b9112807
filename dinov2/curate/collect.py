"""The collect stage: makes a pool of images on your storage, which are files in folders or tar shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dinov2.configuration import Config, Count
from dinov2.curate.overlaps import place_of
from dinov2.curate.pool import Pool, Skipped, write_skipped
from dinov2.curate.steps import Counts, Output, Step, Steps, Task, digest
from dinov2.data.files import escaped, quoted
from dinov2.data.folders import images_among, is_of_tars, located, warn_of_left_out
from dinov2.data.formats import known_formats
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

    Tar shards with their index (``dinov2 index`` writes one) are used where they are, without any step. The final set
    of a curation is taken in the same way. In other folders, of any nesting, all images go into shards in the order of
    their paths. A file is an image by the ending of its name, or else by its content. Hidden files and folders, folders
    of systems, tars beside images and outputs of this library are left out; a warning counts what is left out. Files
    that are no images, or that cannot be read (broken links, pipes), are counted and left out. Links to folders are
    followed, and each folder counts once. If a name is not UTF-8, the column ``path`` has its other bytes as ``\xNN``;
    :func:`~dinov2.data.unescaped` returns the name.

    Args:
        images: folder or URL.
        config: size of shards and limit of files.
        output: folder or URL of the whole curation.

    Raises:
        ValueError: there are no images, or tars have no index.

    Warns:
        SourceWarning: something is left out, or the final set of a curation is read.
        BrokenLinkWarning: links lead nowhere.
    """
    if place_of(images) != place_of(output):  # a curation may write beside its images
        images = located(images, "images")
    storage = Storage(images)
    sizes = storage.find()
    if is_of_tars(storage, images, sizes):
        if not storage.shards():
            raise ValueError(f"images: expected a tar for each index, got {images!r}, which has no tars")
        if missing := storage.shards().keys() - storage.indices().keys():
            raise ValueError(
                f"images: expected an index for each tar, got {len(missing)} tars without one under {images!r}:"
                f" write them with dinov2 index {images}"
            )
        tars = [path.removeprefix(f"{storage.root}/") for path in storage.shards().values()]
        return Pool(images, version=digest([tars, storage.stamps(tars)]))
    contents = images_among(sizes, storage)
    paths = contents.images
    if not paths:
        left_out = f"; left out {contents}" if contents.left_out else ""
        raise ValueError(
            f"images: expected a folder of images or of tar shards, got {images!r}, which has neither{left_out}"
        )
    warn_of_left_out(quoted(images), contents)
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
    step = Step(output, "collect-images", [config, known_formats()], (images, listing), tasks, "files", version=2)
    yield step
    return Pool(step.folder)


def _write(output: Output, images: str, paths: tuple[str, ...], config: CollectConfig) -> Counts:
    """Task: write one shard, and the table of the files that are in none."""
    storage, skipped = Storage(images), list[Skipped]()

    def skip(path: str, reason: str, remark: str) -> None:
        skipped.append(Skipped(escaped(path), reason, remark))

    def files() -> Iterator[ShardImage]:
        for path in paths:
            output.advance()
            full = f"{storage.root}/{path}"
            try:
                entry = storage.filesystem.info(full)
                if entry["type"] != "file":  # a pipe would block the read
                    skip(path, UNREADABLE, "it is no regular file")
                    continue
                if entry["size"] > config.max_bytes:
                    skip(path, TOO_LARGE, f"{entry['size']:,} bytes")
                    continue
                content = storage.filesystem.cat_file(full)
            except OSError as error:
                skip(path, UNREADABLE, error.strerror or str(error))
                continue
            yield ShardImage(key_of(path), content, {"path": escaped(path)})

    report = write_shard(
        files(),
        output.folder,
        int(output.shard),
        lambda image, reason, remark: skipped.append(Skipped(image.columns["path"], reason, remark)),
    )
    write_skipped(output, skipped)
    dropped = Counter(entry.reason for entry in skipped)
    return Counts(len(paths), report.images, dict(sorted(dropped.items())))


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
