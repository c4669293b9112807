"""Pictures of a run: its curves, and its features as colours below the photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.extras import require

TERMS = {
    "DINO: class tokens of all crops": ("dino_global", "dino_local"),
    "iBOT: masked patches": ("ibot",),
}
DPI = 150


def plot_curves(metrics: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], path: Path) -> None:
    """Draw the losses and the k-NN accuracy over the steps of a run into a PNG.

    Args:
        metrics: lines of the run's ``metrics.jsonl``.
        baselines: accuracies, 0 ... 1, drawn as named horizontal lines.
        path: the file to write.

    Raises:
        ImportError: matplotlib is missing (extra ``demo``).
    """
    figure, ((losses, accuracy),) = _figure("plot_curves", 1, 2, size=(13, 4))
    for label, terms in TERMS.items():
        points = [_series(metrics, term) for term in terms]
        losses.plot(points[0][0], sum(values for _, values in points), label=label, linewidth=1.5)
    losses.set(xlabel="step", ylabel="cross-entropy (nats)", title="Loss")
    losses.legend(frameon=False)
    steps, values = _series(metrics, "knn_accuracy")
    accuracy.plot(
        steps, 100 * values, color="black", marker="o", markersize=3, label=f"ViT in training: {values[-1]:.1%}"
    )
    for number, (name, value) in enumerate(baselines.items()):
        accuracy.axhline(100 * value, color=f"C{number}", linestyle="--", linewidth=1.2, label=f"{name}: {value:.1%}")
    accuracy.set(xlabel="step", ylabel="%", title="5-NN accuracy: which photograph is this patch from?")
    accuracy.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (losses, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=DPI)


def plot_rows(rows: Mapping[str, Sequence[npt.NDArray[Any]]], path: Path) -> None:
    """Draw rows of equally many pictures into a PNG, each with its name above.

    Args:
        rows: name of a row -> pictures ``[H, W, 3]``, uint8 or floating point from 0 to 1.
        path: the file to write.

    Raises:
        ImportError: matplotlib is missing (extra ``demo``).
    """
    columns = len(next(iter(rows.values())))
    figure, grid = _figure("plot_rows", len(rows), columns, size=(2 * columns, 2.25 * len(rows)))
    for axes_of_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(axes_of_row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.axis("off")
        axes_of_row[0].set_title(name, loc="left", fontsize=11)
    figure.savefig(path, dpi=DPI)


def _figure(purpose: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure without a window, with its size in inches, and its axes, ``[rows][columns]``."""
    figures = require("matplotlib.figure", extra="demo", purpose=purpose)
    figure = figures.Figure(layout="constrained", figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Steps and values of the lines that contain ``name``."""
    points = [(line["step"], line[name]) for line in metrics if name in line]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values
