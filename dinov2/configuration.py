"""Configurations share this module: bounds of fields, one form of errors, JSON, and atomic replacement of files.

A configuration is a frozen dataclass that derives from :class:`Config`. The bounds of a field stand in its type, and
what several fields must agree on in :meth:`Config.rules`. An error names the field by its full dotted path, which is
how the command line spells it, then what was expected and what came::

    >>> @dataclass(frozen=True)
    ... class Schedule(Config, at="schedule"):
    ...     steps: Count = 100
    ...     warmup: Share = 0.1
    >>> Schedule(warmup=1.5)
    Traceback (most recent call last):
    ValueError: schedule.warmup: expected a number from 0 to 1, got 1.5
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Value = TypeVar("Value")
Rules = Iterator[tuple[str, bool, str] | tuple[str, bool, str, object]]
"""A field by its dotted path, whether its value is fine, what is expected of it, and what came if not the value."""


@dataclass(frozen=True)
class Bound:
    """A bound says what a field must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_ordered(values: Any, most: float = float("inf")) -> bool:
    low, high = values
    return bool(0 <= low <= high <= most)


Count = Annotated[int, Bound("at least 1", lambda value: _is_whole(value) and value >= 1)]
CountOr0 = Annotated[int, Bound("at least 0", lambda value: _is_whole(value) and value >= 0)]
Positive = Annotated[float, Bound("a number above 0", lambda value: value > 0)]
AtLeast0 = Annotated[float, Bound("a number of at least 0", lambda value: value >= 0)]
AtLeast1 = Annotated[float, Bound("a number of at least 1", lambda value: value >= 1)]
Share = Annotated[float, Bound("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Rate = Annotated[float, Bound("a number in [0, 1)", lambda value: 0 <= value < 1)]
Cosine = Annotated[float, Bound("a cosine, from -1 to 1", lambda value: -1 <= value <= 1)]
Range = Annotated[
    tuple[float, float],
    Bound("(low, high) with 0 < low <= high", lambda value: _are_ordered(value) and value[0] > 0),
]
PartRange = Annotated[
    tuple[float, float],
    Bound("(low, high) with 0 < low <= high <= 1", lambda value: _are_ordered(value, 1) and value[0] > 0),
]
ShareRange = Annotated[
    tuple[float, float], Bound("(low, high) with 0 <= low <= high <= 1", lambda value: _are_ordered(value, 1))
]

KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", _is_whole),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: ("text", lambda value: isinstance(value, str)),
    tuple: ("a tuple", lambda value: isinstance(value, tuple)),
}
"""Each plain type has a name for people and a test."""

_is_assembled: ContextVar[bool] = ContextVar("_is_assembled", default=False)


class Config:
    """Base of configurations; see the top of this module.

    Args:
        at: where a configuration of this class stands in the whole, for errors of one that is made by itself.
    """

    _at: ClassVar[str] = ""

    def __init_subclass__(cls, at: str | None = None) -> None:
        if at is not None:
            cls._at = at

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (plain := _plain(value)) is not value:
                object.__setattr__(self, name, plain)  # the dataclass is frozen
        if not _is_assembled.get():
            check(self, self._at)

    def rules(self) -> Rules:
        """Yield the rules between fields. Each field by itself is within its bounds already."""
        return iter(())


def check(config: Config, path: str = "") -> None:
    """Check all fields of a configuration, and of those within it.

    Args:
        config: the configuration.
        path: where it stands in the whole, ``data.augmentation``; empty for the whole.

    Raises:
        ValueError: a field is out of its bounds, or does not go with others; the message names its full path.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for name, value in vars(config).items():
        if (expected := _unmet(hints.get(name, Any), value)) is not None:
            raise _error(path, name, expected, value)
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in parts:
            if isinstance(part, Config):
                check(part, _joined(path, name, key))
    for name, holds, expected, *came in config.rules():
        if not holds:
            raise _error(path, name, expected, came[0] if came else _value_at(config, name))


def assembled(build: Callable[[], Value]) -> Value:
    """Call ``build`` without checks of the configurations that it makes. Check the whole after it."""
    token = _is_assembled.set(True)
    try:
        return build()
    finally:
        _is_assembled.reset(token)


def to_json(value: Any) -> Any:
    """A configuration, or what one is made of, in JSON's own types: paths become text, and tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type[Value], values: Any) -> Value:
    """A configuration from what :func:`to_json` made of it; fields that are missing keep their defaults.

    Raises:
        ValueError: a field is not known, is missing, or is out of its bounds; the message names its full path.
    """
    config: Value = assembled(lambda: _converted(kind, values, ""))
    if isinstance(config, Config):
        check(config)
    return config


def read_json(file: Path, what: str, kind_of: Callable[[Any], type[Value]]) -> Value:
    """The configuration in a file.

    Args:
        file: holds JSON.
        what: it should be the configuration of, for errors.
        kind_of: gives the class of the configuration for the content of the file.

    Raises:
        ValueError: the file holds no such configuration.
    """
    try:
        values = json.loads(file.read_text())
        return from_json(kind_of(values), values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the configuration of {what}: {error}") from error


def write_json(value: Any, file: Path) -> None:
    """Write a configuration, or what one is made of, as JSON that people can read."""
    with replacing(file) as partial:
        partial.write_text(json.dumps(to_json(value), indent=2) + "\n")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of ``file`` once all of it is there.

    Whoever is killed, or fails, while writing leaves the old file whole.
    """
    partial = file.with_name(f".partial-{file.name}")
    yield partial
    partial.replace(file)


def _plain(value: Any) -> Any:
    """NumPy's numbers and texts as Python's, also those in tuples and dictionaries; anything else as it is."""
    numpy = sys.modules.get("numpy")  # a program without it has none of its numbers
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if type(value) is tuple and any(_plain(item) is not item for item in value):
        return tuple(_plain(item) for item in value)
    if type(value) is dict and any(_plain(item) is not item for item in value.values()):
        return {key: _plain(item) for key, item in value.items()}
    return value


@functools.lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _unmet(hint: Any, value: Any) -> str | None:
    """Say what this type expects, or None if the value meets it."""
    unmet = [_unmet_by_one(choice, value) for choice in _choices(hint)]
    return None if None in unmet else " or ".join(text for text in unmet if text)


def _unmet_by_one(hint: Any, value: Any) -> str | None:
    if hint is types.NoneType:
        return None if value is None else "None"
    if get_origin(hint) is Literal:
        return (
            None
            if isinstance(value, Hashable) and value in get_args(hint)
            else f"one of {', '.join(map(str, get_args(hint)))}"
        )
    if get_origin(hint) is Annotated:
        bounds = [bound for bound in hint.__metadata__ if isinstance(bound, Bound)]
        is_fit = _unmet_by_one(hint.__origin__, value) is None  # True is no number, although it is above 0
        return next((bound.expected for bound in bounds if not (is_fit and _holds(bound, value))), None)
    kind = get_origin(hint) or hint
    if kind in KINDS:
        expected, is_one = KINDS[kind]
        of, *more = get_args(hint) or (Any,)
        if not is_one(value) or more != [...]:
            return None if is_one(value) else expected
        unmet = next(filter(None, (_unmet(of, item) for item in value)), None)
        return unmet and f"{expected}, and in it {unmet}"
    if isinstance(kind, type) and issubclass(kind, Config):
        return None if isinstance(value, kind) else "fields by name"
    if isinstance(kind, type) and issubclass(kind, Path):
        return None if isinstance(value, Path) else "a path"
    return None


def _holds(bound: Bound, value: Any) -> bool:
    try:
        return bound.holds(value)
    except (TypeError, ValueError):  # nothing that can be compared, or no pair
        return False


def _converted(hint: Any, value: Any, path: str) -> Any:
    """A value of JSON's types as one of the type that a field has."""
    if get_origin(hint) is Annotated:
        return _converted(hint.__origin__, value, path)
    if value is None:
        return None
    hint = next(choice for choice in _choices(hint) if choice is not types.NoneType)
    kind = get_origin(hint) or hint
    if dataclasses.is_dataclass(kind):
        return _configuration(kind, value, path)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: expected fields by name, got {value!r}")
        return {key: _converted(get_args(hint)[1], item, _joined(path, key)) for key, item in value.items()}
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    return Path(value) if kind is Path and isinstance(value, str) else value


def _configuration(kind: Any, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path or 'the whole'}: expected fields by name, got {values!r}")
    hints, fields = _hints(kind), {entry.name: entry for entry in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ValueError(f"{_joined(path, name)}: expected a field of {kind.__name__}, got an unknown one")
    for name, entry in fields.items():
        if name not in values and entry.default is entry.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_joined(path, name)}: expected a value, got none")
    return kind(**{name: _converted(hints[name], value, _joined(path, name)) for name, value in values.items()})


def _value_at(value: Any, path: str) -> Any:
    """The value of a field within a configuration, by its dotted path."""
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _error(path: str, name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{_joined(path, name)}: expected {expected}, got {value!r}")
