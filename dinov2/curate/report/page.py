"""The style and the parts of the page: tables, charts, small pictures. Text from elsewhere is escaped here."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.curate.faces import Box, blur_faces
from dinov2.curate.pool import Pool, ShardBytes
from dinov2.curate.views import in_reduced
from dinov2.data.decoding import Pixels, UnreadableImageError
from dinov2.data.decoding_reduced import decode_reduced
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { --ink: #1b1f24; --quiet: #667; --line: #d9dce1; --paper: #fff; --bar: #3867b8; --kept: #2c8a4b;
  --gone: #b3403a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --quiet: #9aa3ad; --line: #3a4048; --paper: #16191d; --bar: #7fa6ea; --kept: #63c484;
    --gone: #e5837c }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem; max-width: 72rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem } p { margin: .3rem 0 .8rem; max-width: 50rem }
.quiet { color: var(--quiet) } .names { min-width: 16rem; overflow-wrap: anywhere } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; color: var(--quiet) } .number { text-align: right; white-space: nowrap }
summary { cursor: pointer; color: var(--quiet); margin: .8rem 0 .4rem }
.track { background: var(--line); height: .55rem; width: 9rem; margin-top: .45rem }
.track div { background: var(--bar); height: 100% }
.row { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0 1rem; align-items: flex-start }
.groups { display: flex; flex-wrap: wrap; gap: 0 2.5rem }
figure { margin: 0; width: 7rem } figure img { width: 100%; display: block; border: 2px solid var(--line) }
figure.kept img { border-color: var(--kept) } figure.gone img { border-color: var(--gone) }
figcaption { font-size: .75rem; line-height: 1.3; color: var(--quiet); overflow-wrap: anywhere; margin-top: .2rem }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem } svg text { fill: var(--quiet); font-size: 11px }
svg .bar { fill: var(--bar) } svg .axis { stroke: var(--line) } pre { overflow-x: auto; font-size: .8rem }
@media (max-width: 40rem) { .track { width: 3rem } }
@media print { body { max-width: none } .row { break-inside: avoid } }
"""
WIDTH, HEIGHT, MARGIN = 300, 110, 18
BINS = 30
SIDE = 112
EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def document(title: str, parts: Iterable[str]) -> str:
    """A page that loads nothing from elsewhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, remark: str = "") -> str:
    """A section's title, with a remark about its contents."""
    return f"<h2>{escape(text)}</h2>" + (f'<p class="quiet">{escape(remark)}</p>' if remark else "")


def subheading(text: str) -> str:
    """A title within a section."""
    return f"<h3>{escape(text)}</h3>"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """A table. Cells are HTML already. The columns in ``numbers`` are aligned to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{cells(columns, "th")}</tr>\n{body}\n</table></div>'


def share_bar(share: float) -> str:
    """A bar that shows a share from 0 to 1."""
    return f'<div class="track"><div style="width:{min(max(share, 0), 1):.1%}"></div></div>'


def figure(image: str, caption: str, kind: str = "") -> str:
    """A picture from a data URL with a line below; ``kind`` is kept, gone or nothing."""
    name = f' class="{kind}"' if kind else ""
    return f'<figure{name}><img src="{image}" alt="" loading="lazy"><figcaption>{escape(caption)}</figcaption></figure>'


def row(figures: Iterable[str]) -> str:
    """Pictures side by side."""
    return f'<div class="row">{"".join(figures)}</div>'


def groups(rows: Iterable[str]) -> str:
    """Rows of pictures, side by side if there is room."""
    return f'<div class="groups">{"".join(rows)}</div>'


def histogram(title: str, values: npt.NDArray[np.generic], *, logarithmic: bool = False) -> str:
    """A histogram of values, which must be positive on a logarithmic scale; "" for no values."""
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


class Pictures:
    """The images of a pool as data URLs.

    Args:
        pool: pool of the images.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._files: dict[str, ShardBytes] = {}
        self._ends: list[tuple[int, str]] = []  # the first position after each shard

    def at(self, shard: str, row: int, faces: list[Box] | None = None) -> str:
        """An image with the given faces blurred; an empty picture if the image cannot be read."""
        if shard not in self._files:
            self._files[shard] = self.pool.open_images(shard)
        try:
            image = decode_reduced(self._files[shard][row], "", 4 * SIDE)
        except UnreadableImageError:
            return EMPTY
        boxes = [in_reduced(box, image) for box in faces or []]
        return data_url(blur_faces(image.pixels, boxes) if boxes else image.pixels)

    def at_position(self, position: int) -> str:
        """An image by its number in all shards."""
        if not self._ends:
            parquet, end = require("pyarrow.parquet", extra="curate", purpose="curation"), 0
            storage = Storage(self.pool.images)
            for shard, path in storage.indices().items():
                with storage.filesystem.open(path, "rb") as file:
                    end += parquet.ParquetFile(file).metadata.num_rows
                self._ends.append((end, shard))
        start = 0
        for end, shard in self._ends:
            if position < end:
                return self.at(shard, position - start)
            start = end
        return EMPTY


def data_url(pixels: Pixels) -> str:
    """A small JPEG of a uint8 image [H, W, 3], as a data URL."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
