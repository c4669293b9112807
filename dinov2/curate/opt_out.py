"""How pages and servers say that their images are not to be used."""

from __future__ import annotations

from collections.abc import Iterable


def opts_out(headers: Iterable[str], words: Iterable[str], agent: str) -> bool:
    """Whether X-Robots-Tag headers, or the contents of robots meta tags, hold one of the words for us.

    A value may begin with the name of the robot that it is for: ``googlebot: noindex`` does not concern others.

    Args:
        headers: values, each with directives parted by commas.
        words: directives that count.
        agent: our name as a robot.
    """
    unwanted = {word.lower() for word in words}
    for value in headers:
        concerns_us = True
        for part in value.lower().split(","):
            robot, colon, directive = part.rpartition(":")
            if colon and "unavailable_after" not in robot:
                concerns_us = robot.strip() in ("", "*", agent.lower())
            if concerns_us and directive.strip() in unwanted:
                return True
    return False
