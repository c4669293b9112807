"""What all configurations share: bounds of fields, full paths in errors, JSON, and files replaced as a whole."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from dinov2.configuration import (
    AtLeast0,
    AtLeast1,
    Config,
    Cosine,
    Count,
    CountOr0,
    PartRange,
    Positive,
    Range,
    Rate,
    Rules,
    Share,
    ShareRange,
    assembled,
    check,
    from_json,
    read_json,
    replacing,
    to_json,
    write_json,
)


@dataclass(frozen=True)
class Inner(Config, at="outer.inner"):
    count: Count = 1
    count_or_0: CountOr0 = 0
    positive: Positive = 1.0
    at_least_0: AtLeast0 = 0.0
    at_least_1: AtLeast1 = 1.0
    share: Share = 0.5
    rate: Rate = 0.5
    cosine: Cosine = -1.0
    span: Range = (0.1, 2.0)
    part: PartRange = (0.1, 1.0)
    shares: ShareRange = (0.0, 1.0)
    maybe: Count | None = None
    kind: Literal["a", "b"] = "a"
    text: str = ""
    switch: bool = False
    whole: int = -3
    number: float = -3.0
    names: tuple[str, ...] = ()
    root: str | Path | None = None

    def rules(self) -> Rules:
        yield "count", self.count != 13, "another number"


@dataclass(frozen=True)
class Outer(Config):
    folder: Path
    inner: Inner = field(default_factory=Inner)
    absent: Inner | None = None
    named: dict[str, Inner] = field(default_factory=dict)

    def rules(self) -> Rules:
        yield "inner.count", self.inner.count < 100, "less than 100 in the whole"
        yield "named", "x" not in self.named, "other names", list(self.named)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 0, "at least 1, got 0"),
        ("count", 2.5, "at least 1, got 2.5"),
        ("count", True, "at least 1, got True"),
        ("count_or_0", -1, "at least 0, got -1"),
        ("positive", 0.0, "a number above 0, got 0.0"),
        ("positive", True, "a number above 0, got True"),
        ("positive", float("nan"), "a number above 0, got nan"),
        ("at_least_0", -0.1, "a number of at least 0, got -0.1"),
        ("at_least_1", 0.9, "a number of at least 1, got 0.9"),
        ("share", 1.01, "a number from 0 to 1, got 1.01"),
        ("share", "half", "a number from 0 to 1, got 'half'"),
        ("rate", 1.0, "a number in [0, 1), got 1.0"),
        ("cosine", 60, "a cosine, from -1 to 1, got 60"),
        ("span", (0.0, 1.0), "(low, high) with 0 < low <= high, got (0.0, 1.0)"),
        ("span", 3, "(low, high) with 0 < low <= high, got 3"),
        ("span", (2.0, 1.0), "(low, high) with 0 < low <= high, got (2.0, 1.0)"),
        ("part", (0.5, 1.5), "(low, high) with 0 < low <= high <= 1, got (0.5, 1.5)"),
        ("span", (), "(low, high) with 0 < low <= high, got ()"),
        ("part", (0.0, 1.0), "(low, high) with 0 < low <= high <= 1, got (0.0, 1.0)"),
        ("shares", (-0.1, 0.5), "(low, high) with 0 <= low <= high <= 1, got (-0.1, 0.5)"),
        ("shares", (0.5, 1.5), "(low, high) with 0 <= low <= high <= 1, got (0.5, 1.5)"),
        ("shares", 3, "(low, high) with 0 <= low <= high <= 1, got 3"),
        ("maybe", 0, "at least 1 or None, got 0"),
        ("kind", "c", "one of a, b, got 'c'"),
        ("text", 3, "text, got 3"),
        ("switch", "yes", "True or False, got 'yes'"),
        ("whole", 1.5, "a whole number, got 1.5"),
        ("number", "1", "a number, got '1'"),
        ("names", "abc", "a tuple, got 'abc'"),
        ("names", ("a", 3), "a tuple, and in it text, got ('a', 3)"),
        ("root", 3, "text or a path or None, got 3"),
        ("count", 13, "another number, got 13"),
    ],
)
def test_an_error_names_the_path_what_was_expected_and_what_came(name: str, value: Any, expected: str) -> None:
    def fails_at(path: str, act: Callable[[], object]) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}.{name}: expected {expected}')}$"):
            act()

    fails_at("outer.inner", lambda: Inner(**{name: value}))
    fails_at("inner", lambda: from_json(Outer, {"folder": "f", "inner": {name: value}}))
    fails_at("named.n", lambda: from_json(Outer, {"folder": "f", "named": {"n": {name: value}}}))
    made = assembled(lambda: Outer(Path("f"), absent=Inner(**{name: value})))
    fails_at("absent", lambda: check(made))


def test_what_several_parts_must_agree_on() -> None:
    with pytest.raises(ValueError, match=r"^inner\.count: expected less than 100 in the whole, got 100$"):
        Outer(Path("f"), inner=Inner(count=100))
    with pytest.raises(ValueError, match=r"^named: expected other names, got \['x'\]$"):
        Outer(Path("f"), named={"x": Inner()})


def test_round_trip() -> None:
    config = Outer(Path("a/b"), Inner(names=("c",), span=(1.0, 2.0), root="r", maybe=4), None, {"n": Inner(positive=3)})
    assert from_json(Outer, json.loads(json.dumps(to_json(config)))) == config
    assert from_json(Outer, {"folder": "f"}) == Outer(Path("f"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "the whole: expected fields by name, got []"),
        ("{}", "folder: expected a value, got none"),
        ('{"folder": "f", "inner": {"colour": 1}}', "inner.colour: expected a field of Inner, got an unknown one"),
        ('{"folder": "f", "inner": 3}', "inner: expected fields by name, got 3"),
        ('{"folder": "f", "inner": null}', "inner: expected fields by name, got None"),
        ('{"folder": "f", "named": []}', "named: expected fields by name, got []"),
        ('{"folder": 3}', "folder: expected a path, got 3"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    full = re.escape(f"{tmp_path}/config.json is not the configuration of an example: {message}")
    with pytest.raises(ValueError, match=f"^{full}"):
        read_json(tmp_path / "config.json", "an example", lambda values: Outer)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    write_json(Outer(Path("f")), file)
    before = file.read_text()

    def interrupted() -> None:
        with replacing(file) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == before
    write_json(dataclasses.replace(Outer(Path("g"))), file)
    assert json.loads(file.read_text())["folder"] == "g"
    assert [path.name for path in tmp_path.iterdir() if path.name == "config.json"] == ["config.json"]


def test_numbers_of_numpy_become_pythons() -> None:
    @dataclass(frozen=True)
    class Parts(Config):
        count: Count = 1
        share: Share = 0.5
        is_on: bool = False
        name: str = ""
        spread: Range = (0.1, 1.0)
        by_name: dict[str, float] = field(default_factory=dict)
        shape: Literal["mlp", "swiglu"] = "mlp"

    parts = Parts(
        count=np.int64(3),
        share=np.float32(0.25),
        is_on=np.bool_(True),
        name=np.str_("a"),
        spread=(np.float64(0.5), np.int32(2)),
        by_name={"x": np.float16(0.5)},
        shape=np.str_("swiglu"),
    )
    assert parts == Parts(3, 0.25, True, "a", (0.5, 2), {"x": 0.5}, "swiglu")
    kinds = [type(value) for value in (*vars(parts).values(), *parts.spread, parts.by_name["x"])]
    assert kinds == [int, float, bool, str, tuple, dict, str, float, int, float]
    assert json.loads(json.dumps(to_json(parts)))["count"] == 3
    for fields, message in (
        ({"count": np.float32(3)}, r"count: expected at least 1, got 3\.0"),
        ({"count": np.int8(0)}, "count: expected at least 1, got 0"),
        ({"count": np.array(3)}, r"count: expected at least 1, got array\(3\)"),
        ({"share": np.float64("nan")}, "share: expected a number from 0 to 1, got nan"),
        ({"is_on": np.int64(1)}, "is_on: expected True or False, got 1"),
        ({"shape": np.array(["mlp"])}, "shape: expected one of mlp, swiglu, got array"),
    ):
        with pytest.raises(ValueError, match=message):
            Parts(**fields)
