"""One task after the other, in this process: for debuggers, and for few shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dinov2.curate.engines.engine import Call, Outcome, execute


class Inline:
    """The engine without processes."""

    def run(self, calls: Sequence[Call], at_once: int | None = None) -> Iterator[Outcome]:
        """Run calls in their order."""
        for call in calls:
            try:
                execute(call)
            except Exception as error:
                yield Outcome(call, error)
            else:
                yield Outcome(call, None)
