"""Curate a set to pretrain on from web pages: offline, in minutes on two CPU cores, with known copies.

    python examples/demo_curate.py [--seed 0] [--output runs/curation] [--steps 40]

A web server on this machine serves sloppy pages with patches of the photographs inside scikit-image and scikit-learn.
They contain copies of each other, copies of evaluation images, blank pictures and dead links. All stages run: extract,
download, screen, embed, dedup, retrieve, materialize. Then a small ViT trains on the result for a few steps. The demo
knows what it planted, so the last table shows how much of it the curation found.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from dinov2.cli.curation_progress import Progress
from dinov2.cli.curation_progress import table as stages_table
from dinov2.curate import CurateConfig, Pool, Step, curate, run_steps
from dinov2.curate.download import DownloadConfig
from dinov2.curate.extract import ExtractConfig
from dinov2.curate.pipeline import save_config
from dinov2.curate.pool import read_table
from dinov2.curate.report import write_report
from dinov2.curate.retrieve import RetrieveConfig
from dinov2.demo.planted import PlantedImage, planted_images
from dinov2.recipes import laptop, photos
from dinov2.train import pretrain, read_metrics

PER_PAGE = 25
WANTED = frozenset({"retina", "hubble", "coffee", "flower", "brick", "motorcycle"})
"""Photographs of the seeds. Retrieval should find their patches."""


class Found(NamedTuple):
    """How much of the planted images a curation has found."""

    copies_precision: float  # share of dropped copies whose kept image shows the same picture
    copies_recall: float  # share of copies that were dropped as copies
    evaluation_left: int  # number of copies of evaluation images that were kept
    evaluation_wrongly: int  # number of images dropped as near an evaluation image that are no copies of one
    retrieval_precision: float  # share of retrieved images that come from the seeds' photographs
    retrieval_recall: float  # share of retrieved images among those of these photographs after dedup


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="decides the patches and their copies")
    parser.add_argument("--output", type=Path, help="folder of the curation (default: a new one in runs/)")
    parser.add_argument(
        "--steps", type=int, default=40, help="steps of pretraining on the result (default: %(default)s)"
    )
    arguments = parser.parse_args()
    output = arguments.output or Path("runs") / f"curation-{datetime.now():%Y%m%d-%H%M%S}"
    if output.exists():
        parser.error(f"--output: expected a new folder, got {str(output)!r}, which exists")

    console = Console()
    images = planted_images(arguments.seed)
    with site(images, output / "web") as address, Progress(console) as progress:
        config = configuration(output, address)
        save_config(config)
        with config.engine.open() as engine:
            curated = run_steps(curate(config), engine, watcher=progress)
    report = write_report(config)
    found = compare(images, progress.steps, curated.chosen)

    recipe = dataclasses.replace(photos(), steps=arguments.steps, output=output / "run")
    run = pretrain(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=curated.root)))
    losses = [line["total"] for line in read_metrics(run / "metrics.jsonl") if "total" in line]

    console.print(stages_table(progress.steps))
    console.print(truth_table(found))
    console.print(f"Pretrained for {arguments.steps} steps on {curated.root}: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    console.print(f"Report: {report}")


def configuration(output: Path, address: str) -> CurateConfig:
    """The configuration of all stages for a pool of some hundred images."""
    return dataclasses.replace(
        laptop(),
        output=str(output / "curated"),
        pages=str(output / "web" / "pages"),
        evaluation_sets=(str(output / "web" / "evaluation"),),
        seeds=(str(output / "web" / "wanted"),),
        extract=ExtractConfig(base_url=f"{address}/pages"),
        download=DownloadConfig(
            links_per_shard=200, delay=0.0, per_host=16, tries=2, backoff=0.1, allow_private_addresses=True
        ),
        retrieve=RetrieveConfig(method="sample", neighbours=12),
    )


@contextmanager
def site(images: list[PlantedImage], folder: Path) -> Iterator[str]:
    """Make a folder of pages, images and sets of images, serve it, and yield the address."""
    for place in ("images", "pages", "evaluation", "wanted"):
        (folder / place).mkdir(parents=True)
    pool = [image for image in images if image.role == "pool"]
    for image in images:
        if image.role == "seed" and image.photograph not in WANTED:
            continue
        place = {"pool": "images", "evaluation": "evaluation", "seed": "wanted"}[image.role]
        (folder / place / file_name(image)).write_bytes(image.content)
    for number, start in enumerate(range(0, len(pool), PER_PAGE)):
        (folder / "pages" / f"{number:03d}.html").write_text(page(pool[start : start + PER_PAGE], number))
    handler = functools.partial(_Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def file_name(image: PlantedImage) -> str:
    return image.name + (".png" if image.kind == "distractor" else ".jpg")


def page(images: list[PlantedImage], number: int) -> str:
    """An HTML page that shows images in several ways, together with broken links as on the web."""
    ways = (
        '<img src="../images/{name}" alt="{alt}">',
        '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" data-src="../images/{name}" alt="{alt}">',
        '<img srcset="../images/missing.jpg 50w, ../images/{name} 800w" alt="{alt}">',
        '<picture><source srcset="../images/{name} 2x"><img src="../images/{name}"></picture>',
    )
    shown = "\n".join(
        ways[(number + i) % len(ways)].format(name=file_name(image), alt=f"{image.photograph} &amp; more")
        for i, image in enumerate(images)
    )
    litter = '<img src="../images/gone.jpg"><img src="javascript:void(0)"><img src="http://[::broken"><p>never closed'
    return f"<!doctype html><title>page {number}</title><body>{shown}\n{litter}"


def compare(images: list[PlantedImage], steps: list[Step], chosen: Pool) -> Found:
    """Compare the decisions of a curation with the planted images."""
    by_file = {file_name(image): image for image in images}
    evaluation = {image.name for image in images if image.role == "evaluation"}
    decided = {step.stage: step.folder for step in steps if step.name.endswith("-decisions")}
    planted: list[PlantedImage] = []  # one for each row of all shards
    places: dict[tuple[str, int], int] = {}
    columns: dict[str, list[dict[str, object]]] = {stage: [] for stage in decided}
    for shard in chosen.shards():
        for row, url in enumerate(chosen.index(shard, ["url"])["url"].to_pylist()):
            places[shard, row] = len(planted)
            planted.append(by_file[url.rpartition("/")[2]])
        for stage, folder in decided.items():
            columns[stage] += read_table(folder, shard).to_pylist()
    right = dropped = wrongly = left = 0
    remaining = Counter[str]()  # images of an original that were neither unfit nor near an evaluation image
    for number, image in enumerate(planted):
        screened, deduplicated = columns["screen"][number], columns["dedup"][number]
        kept: int | None = None
        if str(screened["reason"]).startswith(("exact", "near")):
            kept = int(str(screened["kept_row"]))
        elif deduplicated["reason"] == "duplicate":
            kept = places[str(deduplicated["representative_shard"]), int(str(deduplicated["representative_row"]))]
        elif deduplicated["reason"] == "near an evaluation image":
            wrongly += image.original not in evaluation
            continue
        if kept is not None:
            dropped += 1
            right += planted[kept].original == image.original
        left += bool(deduplicated["keep"]) and image.original in evaluation
        if (kept is not None or deduplicated["keep"]) and image.kind != "distractor":
            remaining[image.original] += 1
    copies = sum(number - 1 for number in remaining.values())
    candidates = [n for n in range(len(planted)) if columns["dedup"][n]["keep"]]
    retrieved = [n for n in candidates if columns["retrieve"][n]["keep"]]
    wanted = sum(planted[n].photograph in WANTED for n in retrieved)
    available = sum(planted[n].photograph in WANTED for n in candidates)
    return Found(
        right / max(dropped, 1),
        right / max(copies, 1),
        left,
        wrongly,
        wanted / max(len(retrieved), 1),
        wanted / max(available, 1),
    )


def truth_table(found: Found) -> Table:
    """A table of the planted images and how many were found."""
    table = Table("compared with the planted images")
    table.add_column("precision", justify="right")
    table.add_column("recall", justify="right")
    table.add_row("copies dropped (screen and dedup)", f"{found.copies_precision:.1%}", f"{found.copies_recall:.1%}")
    table.add_row("retrieved for seeds", f"{found.retrieval_precision:.1%}", f"{found.retrieval_recall:.1%}")
    table.add_row("copies of evaluation images left", str(found.evaluation_left), "")
    table.add_row("other images dropped as near an evaluation image", str(found.evaluation_wrongly), "")
    return table


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The next demo starts from the beginning.") from None
