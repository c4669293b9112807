"""The configuration of a run, read back from the ``config.json`` in its directory."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dinov2.train.config import DistillConfig, PretrainConfig, RunConfig

CONFIG = "config.json"
Value = TypeVar("Value")


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
