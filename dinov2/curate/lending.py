"""Lends the results of a shard from one folder of a step to another, if they depend on the same rows and settings.

A step that reads a pool gets a new folder when the pool changes, so nothing in it is ever stale. Most of its shards are
as they were: ten images added to a folder touch one or two. A task that can say what its result depends on leaves a
note with its result. A later task, of another folder, finds the note and takes the files: as links on a disk, else as
copies. Files of results are never rewritten, so both folders may hold the same one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

from dinov2.data.shards.storage import Storage, is_local

PLACES = ("", "images", "index")
"""Folders within a step's folder that hold files of a shard."""


class Lending:
    """The note about one result.

    Args:
        folder: folder of a step, ``OUTPUT/NAME-DIGEST``.
        shard: shard of a task.
        marker: suffix of the file that marks a shard as done.
        note: path of the note under the output. Its name tells all that the result depends on.
    """

    def __init__(self, folder: str, shard: str, marker: str, note: str) -> None:
        self.storage = Storage(folder)
        self.output, _, self.folder = folder.rpartition("/")
        self.shard = shard
        self.marker = marker
        self.note = f"{self.storage.root.rpartition('/')[0]}/{note}"

    def write(self) -> None:
        """Leave the note. The result counts once its shard is done."""
        with self.storage.replace(self.note) as file:
            file.write(json.dumps({"folder": self.folder, "shard": self.shard}).encode())

    def borrow(self) -> bool:
        """Take the result that the note names, if it is there: all its files, the marker last. The note then names this
        folder, because the older one is more likely to be removed."""
        lender = self._lender()
        if lender is None:
            return False
        storage, shard = lender
        try:
            for place, rest, path in self._files(storage, shard):
                self._take(path, "/".join(filter(None, (self.storage.root, place, f"{self.shard}{rest}"))))
            self._take(f"{storage.root}/{shard}{self.marker}", f"{self.storage.root}/{self.shard}{self.marker}")
        except FileNotFoundError:  # someone is removing it
            return False
        self.write()
        return True

    def _lender(self) -> tuple[Storage, str] | None:
        """The folder and the shard that the note names, if the shard is done there."""
        try:
            note = json.loads(self.storage.filesystem.cat_file(self.note))
            folder, shard = str(note["folder"]), str(note["shard"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        storage = Storage(f"{self.output}/{folder}")
        is_itself = (folder, shard) == (self.folder, self.shard)
        is_done = self.storage.filesystem.exists(f"{storage.root}/{shard}{self.marker}")
        return (storage, shard) if is_done and not is_itself else None

    def _files(self, storage: Storage, shard: str) -> Iterator[tuple[str, str, str]]:
        """Place, rest of the name and path of each file of a result, without its marker."""
        for place in PLACES:
            for name, path in storage.files(place, "").items():
                rest = name.removeprefix(shard)
                if rest != name and rest.startswith(".") and not rest.endswith(".partial") and rest != self.marker:
                    yield place, rest, path

    def _take(self, source: str, target: str) -> None:
        filesystem: Any = self.storage.filesystem
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        if not is_local(filesystem):
            filesystem.cp_file(source, target)
            return
        partial = f"{target}.{uuid.uuid4().hex[:8]}.partial"
        try:
            os.link(source, partial)
        except FileNotFoundError:
            raise
        except OSError:  # a disk without links
            with open(source, "rb") as content, self.storage.replace(target) as file:
                shutil.copyfileobj(content, file)
            return
        os.replace(partial, target)
