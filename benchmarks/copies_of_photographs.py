"""How well a curation tells copies from other photographs: ``python -m benchmarks.copies_of_photographs FOLDER...``.

Each folder has photographs that are no copies of each other. A part of them becomes an evaluation set, and copies of
known kinds are planted in the pool: one for every third photograph of the pool, and two for every photograph of the
evaluation set. The curation ``laptop`` collects, screens, embeds and deduplicates the pool. The tables show how many
copies it dropped, and which photographs it dropped wrongly: look at these, since few folders are free of copies.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from rich.console import Console
from rich.table import Table

from dinov2.cli.curation_progress import Progress
from dinov2.curate import Pool, run_steps
from dinov2.curate.collect import collect
from dinov2.curate.dedup import dedup
from dinov2.curate.embed import embed
from dinov2.curate.engines import ProcessPool
from dinov2.curate.pool import read_table
from dinov2.curate.screen import screen
from dinov2.curate.steps import Steps
from dinov2.recipes import laptop

Picture = Image.Image
Random = np.random.Generator
SIDE = 1024  # pixels of the longer side of the photographs
EVALUATION = 0.15  # share of the photographs that are evaluation images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of photographs")
    parser.add_argument("--seed", type=int, default=0, help="decides which photographs are copied, and how")
    arguments = parser.parse_args()
    console = Console(width=150)
    for folder in arguments.folders:
        with tempfile.TemporaryDirectory() as root:
            planted = plant(folder, Path(root), np.random.default_rng(arguments.seed))
            begun = time.monotonic()
            with Progress(console) as progress:
                pool = run_steps(deduplicated(Path(root)), ProcessPool(), watcher=progress)
            seconds = time.monotonic() - begun
            score = scored(planted, pool)
        console.print(f"{folder}: {score.photographs:,} photographs, {len(planted):,} images, {seconds:.0f} s")
        console.print(table(score))
        for dropped, kept in score.wrong:
            console.print(f"  dropped {dropped} as a copy of {kept}")
        for name in score.left:
            console.print(f"  left {name}, a copy of an evaluation image")
        for dropped, reference in score.wrongly_near:
            console.print(f"  dropped {dropped} as near {reference}, an evaluation image")


class Planted(NamedTuple):
    """An image of the pool: the photograph that it shows, how it was made, and whether it is an evaluation image's."""

    original: str
    kind: str
    of_evaluation: bool


def plant(folder: Path, root: Path, rng: Random) -> dict[str, Planted]:
    """Write the pool and the evaluation set into two folders; returns the images of the pool by file name."""
    planted, kinds, seen = {}, list(KINDS), set[bytes]()
    for place in ("pool", "evaluation"):
        (root / place).mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((SIDE, SIDE))
        if (content := picture.tobytes()) in seen:  # some packages have a photograph under several names
            continue
        seen.add(content)
        name = f"{number:05d}-{path.stem[-40:]}"
        is_evaluation = bool(rng.random() < EVALUATION)
        place = "evaluation" if is_evaluation else "pool"
        picture.save(root / place / f"{name}.jpg", quality=92)
        if not is_evaluation:
            planted[f"{name}.jpg"] = Planted(name, "original", False)
        copies = 2 if is_evaluation else int(rng.random() < 1 / 3)
        for kind in rng.permutation(kinds)[:copies].tolist():
            KINDS[kind](picture, rng).save(root / "pool" / f"{name}-{kind}.jpg", quality=85)
            planted[f"{name}-{kind}.jpg"] = Planted(name, kind, is_evaluation)
    return planted


def deduplicated(root: Path) -> Steps[Pool]:
    """The stages of a curation up to dedup."""
    config, output = laptop(), str(root / "curated")
    pool = yield from collect(str(root / "pool"), config.collect, output)
    pool = yield from screen(pool, dataclasses.replace(config.screen, faces="none"), output)
    pool = yield from embed(pool, config.embed_copies, output)
    tests = yield from collect(str(root / "evaluation"), config.collect, output)
    tests = yield from embed(tests, config.embed_copies, output)
    return (yield from dedup(pool, {"evaluation": tests}, config.dedup, output))


class Score(NamedTuple):
    """What a curation did with the planted images.

    Attributes:
        photographs: photographs of the pool.
        copies: planted copies by kind.
        found: those of them that are gone, or whose original is gone for them.
        wrong: photographs dropped as copies, with the images that were kept instead.
        near: planted copies of evaluation images.
        left: those of them that were kept.
        wrongly_near: other images dropped as near an evaluation image, with that image.
    """

    photographs: int
    copies: Counter[str]
    found: Counter[str]
    wrong: list[tuple[str, str]]
    near: int
    left: list[str]
    wrongly_near: list[tuple[str, str]]


def scored(planted: dict[str, Planted], pool: Pool) -> Score:
    """Compare decisions with what was planted."""
    names, screened, decided = list[str](), list[dict[str, object]](), list[dict[str, object]]()
    starts = {}
    for shard in pool.shards():
        starts[shard] = len(names)
        names += pool.index(shard, ["path"])["path"].to_pylist()
        screened += read_table(pool.decisions[0], shard).to_pylist()
        decided += read_table(pool.decisions[-1], shard).to_pylist()
    kept_of: dict[str, list[str]] = defaultdict(list)
    wrong, wrongly_near, left = [], [], []
    fates = {}
    for row, name in enumerate(names):
        image, reason = planted[name], str(screened[row]["reason"] or decided[row]["reason"] or "")
        kept = None
        if reason.startswith(("exact", "near-dup")):
            kept = names[int(str(screened[row]["kept_row"]))]
        elif reason == "duplicate":
            kept = names[
                starts[str(decided[row]["representative_shard"])] + int(str(decided[row]["representative_row"]))
            ]
        if kept is not None and planted[kept].original != image.original:
            wrong.append((name, kept))
        if reason == "near an evaluation image" and not image.of_evaluation:
            wrongly_near.append((name, f"row {decided[row]['reference_row']}"))
        if not reason and image.of_evaluation:
            left.append(name)
        if not reason:
            kept_of[image.original].append(name)
        fates[name] = reason
    copies, found = Counter[str](), Counter[str]()
    for name, image in planted.items():
        if image.kind == "original" or image.of_evaluation or fates[name] in ("too small", "too long", "plain"):
            continue
        copies[image.kind] += 1
        found[image.kind] += len(kept_of[image.original]) < 2
    photographs = sum(image.kind == "original" for image in planted.values())
    near = sum(image.of_evaluation for image in planted.values())
    return Score(photographs, copies, found, wrong, near, left, wrongly_near)


def table(score: Score) -> Table:
    """Recall by kind, and the drops that were wrong."""
    result = Table("planted copies")
    for title in ("number", "recall"):
        result.add_column(title, justify="right")
    for kind, number in score.copies.items():
        result.add_row(kind, f"{number}", f"{score.found[kind] / number:.3f}")
    mean = np.mean([score.found[kind] / number for kind, number in score.copies.items()])
    result.add_row("mean of the kinds", f"{score.copies.total()}", f"{mean:.3f}")
    result.add_row("photographs dropped as copies of others", f"{score.photographs}", f"{len(score.wrong)}")
    result.add_row("copies of evaluation images left", f"{score.near}", f"{len(score.left)}")
    result.add_row("others dropped as near an evaluation image", f"{score.photographs}", f"{len(score.wrongly_near)}")
    return result


def cropped(share: float) -> Callable[[Picture, Random], Picture]:
    """Cut a part with this share of the area."""

    def crop(picture: Picture, rng: Random) -> Picture:
        width, height = (round(side * share**0.5) for side in picture.size)
        left = int(rng.integers(picture.width - width + 1))
        top = int(rng.integers(picture.height - height + 1))
        return picture.crop((left, top, left + width, top + height))

    return crop


def compressed(picture: Picture, rng: Random) -> Picture:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=20)
    return Image.open(file).convert("RGB")


def recoloured(picture: Picture, rng: Random) -> Picture:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(float(rng.uniform(0.6, 1.4)))
    return picture


def with_banner(picture: Picture, rng: Random) -> Picture:
    picture, height = picture.copy(), round(picture.height * 0.18)
    top = int(rng.choice([0, picture.height - height]))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, top, picture.width, top + height), fill=(250, 220, 40))
    draw.text((8, top + height // 3), "ONLY TODAY", fill=(0, 0, 0), font_size=max(10, height // 2))
    return picture


def turned(picture: Picture, rng: Random) -> Picture:
    degrees = float(rng.choice([-8, 8]))
    return picture.rotate(degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255))


def two_at_once(picture: Picture, rng: Random) -> Picture:
    for kind in rng.permutation([kind for kind in KINDS if kind != "two at once"])[:2].tolist():
        picture = KINDS[kind](picture, rng)
    return picture


KINDS: dict[str, Callable[[Picture, Random], Picture]] = {
    "JPEG of quality 20": compressed,
    "half the size": lambda picture, rng: picture.resize([max(1, side // 2) for side in picture.size]),
    "70 % of the area": cropped(0.7),
    "40 % of the area": cropped(0.4),
    "mirror image": lambda picture, rng: ImageOps.mirror(picture),
    "other colours": recoloured,
    "grey": lambda picture, rng: picture.convert("L").convert("RGB"),
    "a banner": with_banner,
    "turned by 8 degrees": turned,
    "two at once": two_at_once,
}
"""Functions that make copies, by the kind of copy."""


if __name__ == "__main__":
    main()
