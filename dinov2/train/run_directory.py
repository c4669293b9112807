"""The directory of a run: who may write into it, and the configuration that it belongs to."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

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
"""Fields that a resumed run may change: where it runs, what it writes, where its images and its frozen teacher lie,
and how long it lasts (a new ``steps`` stretches the schedules of the remaining steps). Anything else would make another
run of it."""
CONFIG = "config.json"
Value = TypeVar("Value")


def check_run_directory(config: RunConfig, *, resume: bool) -> None:
    """Make sure that the run directory is free, or that the run in it is the one to continue; writes nothing.

    Raises:
        FileExistsError: the directory is not empty, and ``resume`` is false.
        ValueError: the run in it was started with another configuration, or is no run.
    """
    directory = config.output
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
        # Read as a configuration, so that a field which is newer than the run has its default there.
        refuse_changes(config_as_json(read_config(directory)), config_as_json(config), directory)


def write_config(config: RunConfig) -> None:
    """Create the run directory and write its ``config.json``."""
    config.output.mkdir(parents=True, exist_ok=True)
    partial = config.output / "config.partial"
    partial.write_text(json.dumps(config_as_json(config), indent=2) + "\n")
    partial.replace(config.output / CONFIG)


def refuse_changes(saved: dict[str, Any], given: dict[str, Any], directory: Path) -> None:
    """Raise a ValueError that lists each field, other than those of MAY_CHANGE, in which two configurations differ."""
    before, now = dict(flatten(saved)), dict(flatten(given))
    changes = [
        f"\n  {name}: was {_text(before, name)}, now {_text(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in MAY_CHANGE and (name not in before or name not in now or before[name] != now[name])
    ]
    if changes:
        raise ValueError(
            f"cannot resume the run in {directory} with another configuration:{''.join(changes)}\n"
            f"Give it the values it was started with; only {', '.join(sorted(MAY_CHANGE))} may change."
        )


def config_as_json(config: RunConfig) -> dict[str, Any]:
    """The configuration in JSON's own types: paths become strings and tuples become lists."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


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
    """Whether a folder is the directory of a run, rather than one of weights, which has a ``config.json`` as well."""
    try:
        return bool({"output", "optim"} <= json.loads((path / CONFIG).read_text()).keys())
    except (OSError, ValueError, AttributeError):
        return False


def read_config(run: Path) -> RunConfig:
    """The configuration of the run in a directory.

    Raises:
        FileNotFoundError: there is no run in it.
        ValueError: its ``config.json`` is of another version, or no configuration of a run.
    """
    file = run / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no directory of a run: it has no {CONFIG}")
    try:
        values = json.loads(file.read_text())
        kind = DistillConfig if "students" in values else PretrainConfig
        return from_json(kind, values)
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not the configuration of a run: {error}") from error


def from_json(kind: type[Value], values: dict[str, Any]) -> Value:
    """An object of a configuration's dataclass from JSON's own types; fields that are missing keep their defaults.

    Raises:
        TypeError: a value belongs to no field.
    """
    hints = get_type_hints(kind)
    return kind(**{name: _convert(hints.get(name, Any), value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint, *_) = [choice for choice in get_args(hint) if choice is not types.NoneType]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if get_origin(hint) is dict:
        return {key: _convert(get_args(hint)[1], item) for key, item in value.items()}
    if get_origin(hint) is tuple:
        return tuple(value)
    return Path(value) if hint is Path else value
