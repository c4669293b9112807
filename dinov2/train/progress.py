"""The display of a run: a header, a progress bar (plain lines if there is no terminal) and a final table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dinov2.models import VisionTransformer
from dinov2.train.config import DistillConfig, RunConfig

NOTABLE_WAIT = 0.1
"""The display warns when the run waits for images for more than this share of the time."""


class RunDisplay:
    """Shows a run of ``config`` that starts after ``start_step`` finished steps."""

    def __init__(self, config: RunConfig, start_step: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.config = config
        self._started = time.monotonic()
        self._steps_done = 0
        self._probe: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_interactive,
            speed_estimate_period=300,
            expand=True,
        )
        self._task = self._progress.add_task("", total=config.steps, completed=start_step, status="")

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def header(
        self,
        *,
        models: Mapping[str, VisionTransformer],
        data: str,
        device: str,
        start_step: int,
        weights: str | None = None,
        graph: str | None = None,
    ) -> None:
        """Describe the run before it starts.

        Args:
            models: the backbones that are trained, by name.
            data, device: the images and the device, in words.
            start_step: number of finished steps.
            weights: origin of the initial weights; None if they are random.
            graph: the step from which on graphs replay the steps, in words; None without CUDA graphs.
        """
        config = self.config
        console = self.console
        begin = f"continuing after step {start_step:,}" if start_step else "starting"
        console.print(f"[bold]DINOv2 {config.kind}[/bold], {begin}", highlight=False)
        rows = {
            **{name or "model": _describe(model) for name, model in models.items()},
            **({"teacher": f"{config.frozen_teacher}, frozen"} if isinstance(config, DistillConfig) else {}),
            **({"weights": weights} if weights else {}),
            "data": data,
            "batch": f"{config.batch_size} images x {config.steps:,} steps"
            + (f", in {config.accumulation_steps} micro-batches" if config.accumulation_steps > 1 else ""),
            "device": f"{device}, {config.precision}",
            **({"graph": graph} if graph else {}),
            "run": str(config.output),
        }
        for name, text in rows.items():
            console.print(f"  [dim]{name:<{max(map(len, rows))}}[/dim] {text}", highlight=False, soft_wrap=True)

    def advance(self) -> None:
        """Count one more step."""
        self._steps_done += 1
        self._progress.advance(self._task)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Show metrics beside the bar, or as a plain line if there is no terminal that can draw it anew."""
        status = f"loss [bold]{values['total']:.3f}[/bold]  {values['images_per_second']:.0f} images/s"
        status += f"  {values['memory_gb']:.1f} GB"
        if "mfu" in values:
            status += f"  {values['mfu']:.0%} of peak FLOP/s"
        if values["data_wait"] > NOTABLE_WAIT:
            status += f"  [yellow]{values['data_wait']:.0%} waiting for images[/yellow]"
        self._progress.update(self._task, status=status + self._probe_text())
        if not self.console.is_interactive:
            left = (self.config.steps - step) * (time.monotonic() - self._started) / max(1, self._steps_done)
            self.console.print(
                f"step {step}/{self.config.steps}  {status}  {_duration(left)} left", highlight=False, soft_wrap=True
            )

    def probe(self, step: int, values: Mapping[str, float]) -> None:
        """Show what the probe measured."""
        self._probe = dict(values)
        self.console.print(f"step {step}:{self._probe_text()}", highlight=False)

    def profiled(self, trace: Path) -> None:
        """Print the path of a trace."""
        self.console.print(f"profile: {trace}, for ui.perfetto.dev", highlight=False, soft_wrap=True)

    def finish(self, lines: Sequence[Mapping[str, float]], models: Sequence[Path]) -> None:
        """Print a table of the first and last metrics, and the paths of the results."""
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for line in lines:
            first = {**line, **first}
            last |= line
        table = Table(title=f"{last.pop('step'):,} steps", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("metric")
        table.add_column("first", justify="right")
        table.add_column("last", justify="right")
        for name in last:
            table.add_row(name, f"{first[name]:.4g}", f"{last[name]:.4g}")
        self.console.print(table)
        output = self.config.output
        for name, text in {
            "model": ", ".join(map(str, models)),
            "metrics": str(output / "metrics.jsonl"),
            "curves": f"tensorboard --logdir {output / 'tensorboard'}",
        }.items():
            self.console.print(f"  [dim]{name:<7}[/dim] {text}", highlight=False, soft_wrap=True)

    def _probe_text(self) -> str:
        return "".join(f"  {name} {value:.3f}" for name, value in self._probe.items())


def _describe(model: VisionTransformer) -> str:
    vit, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    return (
        f"ViT, {vit.depth} blocks of width {vit.embed_dim}, patch {vit.patch_size}, {parameters / 1e6:.1f} M parameters"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
