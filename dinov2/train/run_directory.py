"""The directory of a run and its ``config.json``: which run may write there, and which fields may change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinov2.configuration import read_json, to_json, write_json
from dinov2.data.files import quoted
from dinov2.train.config import DistillConfig, PretrainConfig, RunConfig

MAY_CHANGE = frozenset(
    {
        "output",
        "steps",
        "device",
        "activation_checkpointing",
        "compile",
        "cuda_graph",
        "profile_steps",
        "peak_tflops",
        "log_every",
        "probe_every",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "data.root",
        "frozen_teacher",
        "data.num_workers",
        "parallel.sharding",
        "parallel.shard_size",
        "parallel.timeout_seconds",
    }
)
"""Fields that a resumed run may change: its device, what it writes, the paths of its images and its frozen teacher, and
its length (a new ``steps`` stretches the schedules of the remaining steps). Any other change would make a different
run."""
CONFIG = "config.json"


def check_run_directory(config: RunConfig, *, resume: bool) -> None:
    """Check that the run directory is free, or that it holds the run to continue. Nothing is written.

    Raises:
        FileExistsError: the directory is not empty, and ``resume`` is false.
        ValueError: the directory holds a run with another configuration, or no run, or its name is not UTF-8.
    """
    directory = config.output
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"output: expected a path that is UTF-8, because TensorBoard takes no other, got {quoted(directory)}"
        ) from None
    config_file = directory / CONFIG
    occupied = directory.is_dir() and any(directory.iterdir())
    if occupied and not resume:
        raise FileExistsError(
            f"output directory {directory} is not empty: continue the run in it with --resume,"
            " or choose another --output"
        )
    if occupied:
        if not config_file.is_file():
            raise ValueError(f"cannot resume in {directory}: it holds files, but no config.json of a run")
        # Read it as a configuration, so that fields newer than the run have their defaults.
        refuse_changes(to_json(read_config(directory)), to_json(config), directory)


def write_config(config: RunConfig) -> None:
    """Create the run directory and write its ``config.json``."""
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config, config.output / CONFIG)


def refuse_changes(saved: dict[str, Any], given: dict[str, Any], directory: Path) -> None:
    """Raise a ValueError that lists all fields in which two configurations differ, except those of MAY_CHANGE."""
    before, now = dict(flatten(saved)), dict(flatten(given))
    changes = [
        f"\n  {name}: was {_text(before, name)}, now {_text(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in MAY_CHANGE and (name not in before or name not in now or before[name] != now[name])
    ]
    if changes:
        raise ValueError(
            f"cannot resume the run in {directory} with another configuration:{''.join(changes)}\n"
            f"Use the values of its start; only {', '.join(sorted(MAY_CHANGE))} may change."
        )


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of nested dictionaries."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(values: dict[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory. A folder of weights also has a ``config.json``, but another kind."""
    try:
        return bool({"output", "optim"} <= json.loads((path / CONFIG).read_text()).keys())
    except (OSError, ValueError, AttributeError):
        return False


def read_config(run: Path) -> RunConfig:
    """The configuration of the run in a directory.

    Raises:
        FileNotFoundError: the directory holds no run.
        ValueError: its ``config.json`` belongs to another version, or is not the configuration of a run.
    """
    file = run / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not the directory of a run: it has no {CONFIG}")
    return read_json(file, "a run", lambda values: DistillConfig if "students" in values else PretrainConfig)
