"""Histograms as SVG within the page."""

from __future__ import annotations

from html import escape

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT, MARGIN = 300, 110, 18
BINS = 30


def histogram(title: str, values: npt.NDArray[np.generic], *, logarithmic: bool = False) -> str:
    """How often values lie where; those on a logarithmic scale must be positive. Nothing for no values."""
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return ""
    scaled = np.log10(numbers) if logarithmic else numbers
    counts, edges = np.histogram(scaled, BINS)
    if logarithmic:
        edges = 10**edges
    highest, wide = max(int(counts.max()), 1), WIDTH / BINS
    bars = "".join(
        f'<rect class="bar" x="{i * wide:.1f}" y="{MARGIN + HEIGHT * (1 - count / highest):.1f}" width="{wide - 1:.1f}"'
        f' height="{HEIGHT * count / highest:.1f}"><title>{edges[i]:.4g} to {edges[i + 1]:.4g}: {count:,}</title>'
        "</rect>"
        for i, count in enumerate(counts.tolist())
    )
    bottom = MARGIN + HEIGHT
    labels = "".join(
        f'<text x="{x}" y="{bottom + 14}" text-anchor="{anchor}">{value:.4g}</text>'
        for x, anchor, value in (
            (0, "start", edges[0]),
            (WIDTH / 2, "middle", edges[BINS // 2]),
            (WIDTH, "end", edges[-1]),
        )
    )
    scale = ", logarithmic" if logarithmic else ""
    return (
        f"<div><h3>{escape(title)}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {bottom + 18}" width="{WIDTH}" role="img" aria-label="{escape(title)}">'
        f'<text x="0" y="11">{len(numbers):,} values{scale}; highest bar {highest:,}</text>'
        f'{bars}<line class="axis" x1="0" x2="{WIDTH}" y1="{bottom}" y2="{bottom}"/>{labels}</svg></div>'
    )
