"""The configuration of a curation, kept beside what it made."""

from __future__ import annotations

import json

from dinov2.curate.config import CurateConfig
from dinov2.curate.steps import plain
from dinov2.data.shards.storage import Storage


def save_config(config: CurateConfig) -> None:
    """Write ``config.json`` into the output; of several curations with one output, it is the last one's."""
    storage = Storage(config.output)
    with storage.replace(f"{storage.root}/config.json") as file:
        file.write(json.dumps(plain(config), indent=1).encode())
