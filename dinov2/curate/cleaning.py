"""Finds and removes what earlier configurations and killed tasks have left in the output of a curation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dinov2.curate.pipeline import CurateConfig, curate
from dinov2.curate.steps import ABOUT, COUNTS, PARTIAL
from dinov2.data.shards.storage import Storage, is_local

FINAL = "materialize-set"
"""Name of the step whose folder is trained on."""
DIGEST = re.compile(r"-[0-9a-f]{10}")


class Leftovers(NamedTuple):
    """What a curation does not need. Paths are those of the storage.

    Attributes:
        folders: folders of steps that no configuration needs, with the bytes that their removal frees.
        final_sets: final sets among them. A training run may read one, so they are apart.
        files: half-written files in the folders that stay, with their bytes.
        links: links that have the name of a step's folder. They are left alone.
    """

    folders: dict[str, int]
    final_sets: dict[str, int]
    files: dict[str, int]
    links: list[str]


def leftovers(configs: Sequence[CurateConfig]) -> Leftovers:
    """Find what no configuration needs.

    A folder counts only if it directly is in the output, has the name of a step with a digest, and holds the note that
    a step leaves. Folders that a configuration names as its source stay.

    Args:
        configs: configurations with the same output, whose curations have ended.

    Raises:
        ValueError: the outputs differ, or a curation has not ended, so that nobody knows what its later steps need.
    """
    output = configs[0].output
    needed = set[str]()
    for config in configs:
        if config.output != output:
            raise ValueError(f"output: expected {output!r} in all configurations, got {config.output!r}")
        needed |= _needed(config)
    storage = Storage(output)
    sources = [_resolved(storage, path) for config in configs for path in _sources(config)]
    folders, links = list[str](), list[str]()
    partial = dict(_half_written(storage, storage.root))
    for path in _entries(storage, storage.root):
        name = path.rpartition("/")[2]
        if not DIGEST.fullmatch(name[-11:]):
            continue
        if is_local(storage.filesystem) and os.path.islink(path):
            links.append(path)
        elif not _is_of_step(storage, path, name[:-11]):
            continue
        elif name in needed or any(_contains(_resolved(storage, path), source) for source in sources):
            for folder in (path, f"{path}/images", f"{path}/index", f"{path}/{ABOUT}"):
                partial |= dict(_half_written(storage, folder))
        else:
            folders.append(path)
    partial |= dict(_half_written(storage, f"{storage.root}/{ABOUT}"))
    final = [path for path in folders if path.rpartition("/")[2].startswith(f"{FINAL}-")]
    others = [path for path in folders if path not in final]
    return Leftovers(_freed(storage, others), _freed(storage, final), partial, links)


def remove(output: str, paths: Iterable[str]) -> None:
    """Remove folders and files that :func:`leftovers` found, and the notes that lend results of these folders."""
    storage = Storage(output)
    for path in paths:
        storage.filesystem.rm(path, recursive=True)
    for note in storage.files(ABOUT, COUNTS).values():
        folder = json.loads(storage.filesystem.cat_file(note)).get("folder")
        if folder is not None and not storage.filesystem.exists(f"{storage.root}/{folder}"):
            storage.filesystem.rm(note)


def _needed(config: CurateConfig) -> set[str]:
    """Names of the folders of all steps."""
    names = set[str]()
    for step in curate(config):
        if missing := len({task.shard for task in step.tasks} - step.finished()):
            raise ValueError(
                f"expected a curation that has ended, but {missing} of {len(step.tasks)} shards of {step.name} are"
                " missing: what its later steps need is not known yet, so run it first"
            )
        names.add(step.folder.rpartition("/")[2])
    return names


def _sources(config: CurateConfig) -> Iterator[str]:
    """All paths that a configuration reads."""
    single = (config.pages, config.links, config.images, config.embed_copies.model, config.embed.model)
    yield from filter(None, (*single, config.screen.faces, config.screen.nsfw, *config.seeds, *config.evaluation_sets))


def _resolved(storage: Storage, path: str) -> str:
    """A path without links. A URL is taken as it is, without its protocol."""
    if "://" in path:
        return str(Storage(path).root)
    return os.path.realpath(path) if is_local(storage.filesystem) else path


def _contains(folder: str, path: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _is_of_step(storage: Storage, folder: str, name: str) -> bool:
    """Whether a folder holds the note of the step of this name."""
    try:
        note = json.loads(storage.filesystem.cat_file(f"{folder}/{ABOUT}/step.json"))
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and note.get("name") == name


def _entries(storage: Storage, folder: str) -> list[str]:
    try:
        return sorted(path.rstrip("/") for path in storage.filesystem.ls(folder, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _half_written(storage: Storage, folder: str) -> Iterator[tuple[str, int]]:
    """Files that a killed process left, with their bytes."""
    for path in _entries(storage, folder):
        if path.endswith(PARTIAL) and storage.filesystem.isfile(path):
            yield path, storage.filesystem.size(path)


def _freed(storage: Storage, folders: list[str]) -> dict[str, int]:
    """The bytes that go with each folder. A file that several folders hold counts with the last of them."""
    if not is_local(storage.filesystem):
        return {folder: storage.filesystem.du(folder) for folder in folders}
    freed, seen = dict.fromkeys(folders, 0), dict[tuple[int, int], int]()
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                status = os.lstat(os.path.join(place, name))
                identity = status.st_dev, status.st_ino
                seen[identity] = seen.get(identity, 0) + 1
                if seen[identity] == status.st_nlink:
                    freed[folder] += status.st_size
    return freed
