"""robots.txt of each host, read once (RFC 9309)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from dinov2_kernels._extras import require

MAX_BYTES = 512_000


class RobotsFile(NamedTuple):
    """What a server answered."""

    status: int  # 0 for no answer
    content: bytes


class Robots:
    """Says what a host allows.

    Args:
        fetch: gets the file at a URL.
        agent: our name.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[RobotsFile]], agent: str) -> None:
        self._fetch = fetch
        self._agent = agent
        self._rules: dict[str, asyncio.Task[Any]] = {}

    async def allows(self, url: str) -> bool:
        """Whether the host lets us have a URL."""
        parts = urlsplit(url)
        root = f"{parts.scheme}://{parts.netloc}"
        if root not in self._rules:
            self._rules[root] = asyncio.ensure_future(self._read(f"{root}/robots.txt"))
        rules = await asyncio.shield(self._rules[root])
        return rules if isinstance(rules, bool) else bool(rules.can_fetch(url, self._agent))

    async def _read(self, url: str) -> Any:
        """Rules; or True where there are none, False where the server cannot say."""
        protego = require("protego", extra="curate", purpose="reading robots.txt")
        answer = await self._fetch(url)
        if 400 <= answer.status < 500 and answer.status != 429:
            return True
        if answer.status != 200:
            return False
        return protego.Protego.parse(answer.content.decode("utf-8", "replace"))
