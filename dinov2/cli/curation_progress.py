"""The display of a curation: a progress bar for each step, and a table of what was kept and removed."""

from __future__ import annotations

from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID
from rich.table import Table

from dinov2.cli.counting import counting_bar
from dinov2.curate import Step, Watcher
from dinov2.curate.runner import summarize


class Progress(Watcher):
    """Shows steps while they run, and remembers them.

    Attributes:
        steps: the finished steps.
    """

    def __init__(self, console: Console) -> None:
        self.steps: list[Step] = []
        self._console = console
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def started(self, step: Step, done: int) -> None:
        """Start the progress bar of a step."""
        self._bars = counting_bar(step.name, self._console)
        self._bars.start()
        self._task = self._bars.add_task("", total=sum(task.weight for task in step.tasks))

    def progressed(self, step: Step, rows: int) -> None:
        """Advance the progress bar."""
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=rows)

    def retrying(self, step: Step, shard: str, error: Exception) -> None:
        """Print why a shard is tried again."""
        self._say(f"{step.name}: shard {shard} failed and will be tried again: {error}")

    def ended(self, step: Step) -> None:
        """Replace the progress bar by one line."""
        self._stop()
        self.steps.append(step)
        counts = step.counts()
        self._say(f"{step.name}: {counts.rows_out:,} of {counts.rows_in:,} {step.unit}")

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def table(steps: list[Step]) -> Table:
    """A table of the inputs and outputs of each stage, and of the reasons for removal."""
    result = Table(box=SIMPLE_HEAD)
    for name in ("stage", "in", "out", "seconds", "a second"):
        result.add_column(name, justify="left" if name == "stage" else "right")
    result.add_column("dropped")
    for stage in summarize(steps):
        dropped = "\n".join(f"{number:,} {reason}" for reason, number in stage.dropped.items())
        speed = f"{stage.rows_in / stage.seconds:,.0f}" if stage.seconds else ""
        rows = f"{stage.rows_in:,}", f"{stage.rows_out:,}"
        result.add_row(stage.name, *rows, f"{stage.seconds:,.1f}", speed, dropped)
    return result
