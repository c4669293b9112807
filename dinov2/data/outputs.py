"""Folders that this library wrote: it does not read them as images, and finds the final set of a curation in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from dinov2.data.files import quoted
from dinov2.data.shards.storage import Storage

CONFIG, FINAL, REPORT = "config.json", "final_set.json", "report.html"
FATES, DROPPED = "fates.parquet", "dropped.csv"
MAX_CONFIG = 10_000_000  # bytes; a larger file is no configuration
FEATURES = ("features.npy", "images.csv")
"""The files of ``dinov2 embed``."""

_STEP = re.compile(r"[a-z]+-[\w-]+-[0-9a-f]{10}", re.ASCII)
_NOTE = ("/about", "step.json")
_OWN = re.compile(
    rf"(.*)/({'|'.join(map(re.escape, (CONFIG, FINAL, REPORT, FATES, DROPPED)))}"
    rf"|about/{_STEP.pattern}-[0-9a-f]{{32}}\.json)(\.[0-9a-f]{{8}}\.partial)?",
    re.ASCII | re.DOTALL,
)
"""Files of a curation that are in no folder of a step, also half-written ones, by their path behind a slash."""
CURATION = "a curation"
_KINDS = {CURATION: {"output", "collect", "screen", "materialize"}, "a run": {"output", "optim"}}
"""The fields by which configurations are known."""
_NO_RESULT = ("output", "engine")
"""Fields of a curation on which its results do not depend."""


def of_outputs(storage: Storage, paths: Collection[str]) -> dict[str, str]:
    """Files that belong to an output of this library under a root, with words that say to which.

    Outputs are curations, runs of training and features. A curation may write beside images, also into the root. So
    only its results belong to it, and other files in its folder do not.

    Args:
        storage: the root.
        paths: all files under the root, relative to it.

    Returns:
        Words such as ``in curated (a curation)`` by path.
    """
    folders, curations, found = dict[str, str](), dict[str, str](), dict[str, str]()
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name == CONFIG and (kind := _kind_of(_read_json(storage, path))):
            if kind == CURATION:
                curations[folder] = _words(folder, kind)
            elif folder:
                folders[folder] = _words(folder, kind)
        elif name == _NOTE[1] and folder.endswith(_NOTE[0]):
            parent, _, step = folder.removesuffix(_NOTE[0]).rpartition("/")
            if _STEP.fullmatch(step):
                folders[f"{parent}/{step}".lstrip("/")] = _words(parent, CURATION)
        elif folder and name == FEATURES[0] and f"{folder}/{FEATURES[1]}" in paths:
            folders[folder] = _words(folder, "features")
    for path in paths if folders or curations else ():
        if (own := _OWN.fullmatch(f"/{path}")) and (words := curations.get(own[1].removeprefix("/"))):
            found[path] = words
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if words := folders.get("/".join(parts[:depth])):
                found[path] = words
                break
    return found


def _words(folder: str, kind: str) -> str:
    return f"in {folder} ({kind})" if folder else f"of {kind} itself"


def final_set(root: str) -> str | None:
    """Folder of the final set of a curation; None if the root is no curation.

    Raises:
        ValueError: the curation that its ``config.json`` describes has not ended.
    """
    storage = Storage(root)
    config = _read_json(storage, CONFIG)
    if _kind_of(config) != CURATION:
        return None
    final = _read_json(storage, FINAL)
    if isinstance(final, dict) and final.get("config") == digest_of(config):
        found = f"{root.rstrip('/')}/{final.get('set')}"
        if Storage(found).indices():
            return found
    raise ValueError(
        f"root: expected images, got {quoted(root)}, a curation without the final set of its {CONFIG}; finish it with:"
        f" dinov2 curate run {root.rstrip('/')}/{CONFIG}"
    )


def save_final_set(root: str, config: Mapping[str, Any], name: str) -> None:
    """Note the final set of a curation, by its name within the root, if the ``config.json`` there is that of the
    curation. A report of other settings changes nothing."""
    storage = Storage(root)
    current = _read_json(storage, CONFIG)
    if isinstance(current, dict) and digest_of(current) == digest_of(config):
        with storage.replace(f"{storage.root}/{FINAL}") as file:
            file.write(json.dumps({"set": name, "config": digest_of(config)}).encode())


def forget_final_set(root: str) -> None:
    """Remove the note of :func:`save_final_set`, because the curation begins anew."""
    storage = Storage(root)
    path = f"{storage.root}/{FINAL}"
    if storage.filesystem.exists(path):
        with contextlib.suppress(FileNotFoundError):  # another process of the curation was faster
            storage.filesystem.rm(path)


def digest_of(config: Mapping[str, Any]) -> str:
    """A digest of the fields of a curation, a JSON object, on which its results depend."""
    fields = {name: value for name, value in config.items() if name not in _NO_RESULT}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _kind_of(config: Any) -> str | None:
    """What a configuration describes."""
    if isinstance(config, dict):
        for kind, fields in _KINDS.items():
            if fields <= config.keys():
                return kind
    return None


def _read_json(storage: Storage, path: str) -> Any:
    """The value in a small JSON file; None if there is none."""
    full = f"{storage.root}/{path}"
    try:
        if storage.filesystem.size(full) > MAX_CONFIG:
            return None
        return json.loads(storage.filesystem.cat_file(full))
    except (OSError, ValueError, RecursionError):
        return None
