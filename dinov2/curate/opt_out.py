"""How pages and servers say that their images are not to be used."""

from __future__ import annotations

import re
from collections.abc import Iterable

NO_ROBOTS = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
"""Directives that have a value after a colon, as robots' names have their directives."""

ROBOT = re.compile(r"[a-z_*][\w*.-]*", re.ASCII)


def opts_out(headers: Iterable[str], words: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag headers, or the contents of robots meta tags, hold one of the words for us.

    A value may begin with the name of the robot that it is for, as may each directive in it: ``googlebot: noindex,
    noai`` does not concern others.

    Args:
        headers: values, each with directives parted by commas.
        words: directives that count.
        agent: our name as a robot.
    """
    unwanted = {word.lower() for word in words}
    for value in headers:
        concerns_us = True
        for part in value.lower().split(","):
            name, colon, directive = (text.strip() for text in part.partition(":"))
            if not colon:
                directive = name
            elif name in NO_ROBOTS or not (name == "" or ROBOT.fullmatch(name)):  # such as a date with its time
                continue
            else:
                concerns_us = name in ("", "*", agent.lower())
            if concerns_us and directive in unwanted:
                return True
    return False
