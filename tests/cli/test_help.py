"""Help in plain English: what a line says of a command or an option has a verb, and does not begin with "Of"."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress

import pytest

from dinov2.cli import COMMANDS, main
from dinov2.recipes import CURATIONS, RECIPES

HELPS = [
    ["--help"],
    *([command, "--help"] for command in COMMANDS),
    *(["pretrain", name, "--help"] for name in RECIPES),
    *(["curate", "run", name, "--help"] for name in CURATIONS),
]
VERBS = frozenset(
    re.findall(
        r"[a-z]+",
        """
    add allow are ask average balance become begin belong blur build change choose clip come complain compress
    compute connect continue convert copy count cover curate cut decay decide deduplicate depend detect differ
    divide do download draw drop embed end evaluate exceed exist exit expect export fail fetch find finish fit
    follow get give go goes grow has have hold honour improve include index interpolate invert is keep know lack
    learn leave let lie limit link list look lose make map mark mask match mean measure move must name need obey
    open optimise order pack pass permute plan precede prefer pretrain print process put quit raise read
    recompute reduce refuse remove replace replay represent resize resume retrieve return reverse rise run
    sample save say screen see seed send set share show shrink shuffle skip smooth solarise split stand start
    stay stop store stretch subtract suit take tell time train treat try turn use wait want was were write
    """,
    )
)
SHAPES = (("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("d", ""), ("ing", ""), ("ing", "e"))


NAME = re.compile(r"\s*(?:usage:|-{1,2}\w|[╭╰]|[─-]+$|[\w.]+ options$|\w+\s*$|[\w ,]+:$)")
"""Lines that are no prose: a usage, an option's name, a frame, a heading."""


def is_verb(word: str) -> bool:
    """Whether a word is one of VERBS, in any of its regular forms."""
    stems = [word, *(word.removesuffix(end) + start for end, start in SHAPES if word.endswith(end))]
    return any(stem in VERBS or stem[:-1] in VERBS for stem in stems if stem)  # the last: "mapped", "stopped"


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with suppress(SystemExit):
        main(arguments)
    return capsys.readouterr().out


def statements(text: str) -> Iterator[str]:
    """What a help says: paragraphs sentence by sentence, and what stands beside or below each option or example."""
    lines = [re.sub(r"^│(.*)│$", r"\1", line).rstrip() for line in text.splitlines()]
    paragraph: list[str] = []
    for line in [*lines, ""]:
        beside = re.match(r"\s+(?:dinov2|-|[\w,{}\[\]./*]+ {2,}).*? {2,}(\S.*)$", line)
        is_name = re.match(NAME, line) or " dinov2 " in line
        if beside or is_name or not line.strip():
            yield from sentences(" ".join(paragraph))
            paragraph = [beside[1]] if beside else []
        else:
            paragraph.append(line.strip())


def sentences(text: str) -> Iterator[str]:
    text = re.sub(r"\s*\((?:default|sets|fixed)[^)]*\)+\s*$", "", text)
    yield from (part for part in re.split(r"(?<=\.) (?=[A-Z])", text) if part.strip())


def test_what_is_a_statement() -> None:
    text = "usage: x [-h]\n         [--y]\n\nDo this. Do\nthat.\n\noptions:\n  --y Y   take y\n          or not"
    assert list(statements(text))[-3:] == ["Do this.", "Do that.", "take y or not"]
    assert all(map(is_verb, ("keeps", "dropped", "taking", "copies")))
    assert not is_verb("number")


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_is_made_of_sentences(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = [statement for statement in statements(help_of(arguments, capsys)) if not statement.startswith("[")]
    assert said
    assert [statement for statement in said if statement.startswith(("Of ", "of "))] == []
    without = [statement for statement in said if not any(map(is_verb, re.findall(r"[a-z-]+", statement.lower())))]
    assert without == []
