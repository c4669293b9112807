"""How well the built-in features tell planted copies from other images, over the threshold: ``copies_curve.py PNG``.

One set has tiles of the right halves of the bundled photographs, which the network never saw. The other set is the
crawl of the demo, with tiles of both halves. Each set has three seeds. Plain images are left out, as in a curation.
Images are linked if their cosine is above the threshold, and one image of each connected component stays. Precision and
recall are those of the dropped images: a drop is right if its component keeps an image of the same original. The script
prints a table, and draws the curve.
"""

from __future__ import annotations

import io
import sys
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dinov2.curate.copies.features import describe_copies
from dinov2.curate.screen import ScreenConfig, quality
from dinov2.demo.planted import PlantedImage, planted_images

THRESHOLDS = np.arange(0.5, 0.96, 0.05)


class Score(NamedTuple):
    """Precision and recall of dropping copies at one threshold."""

    precision: float
    recall: float


def main() -> None:
    sets = {
        "right halves, never seen": [planted_images(seed, half="right") for seed in range(3)],
        "the demo's crawl": [planted_images(seed) for seed in range(3)],
    }
    scores = {name: [scores_of(images) for images in seeds] for name, seeds in sets.items()}
    for name, seeds in scores.items():
        print(f"\n{name}: precision and recall, lowest to highest of three seeds")
        for number, threshold in enumerate(THRESHOLDS):
            of_seeds = np.array([score[number] for score in seeds])  # [3, 2]
            low, high = of_seeds.min(axis=0), of_seeds.max(axis=0)
            print(f"  {threshold:.2f}  {low[0]:.3f} to {high[0]:.3f}   {low[1]:.3f} to {high[1]:.3f}")
    print("\nmean cosine to the original by kind, right halves")
    for kind, cosine in cosines_by_kind(sets["right halves, never seen"][0]).items():
        print(f"  {kind:9} {cosine:.2f}")
    if len(sys.argv) > 1:
        draw(scores, sys.argv[1])


def described(images: list[PlantedImage]) -> tuple[list[PlantedImage], npt.NDArray[np.float32]]:
    """The images of the pool that screening keeps, and their features [n, 128]."""
    pictures = [np.asarray(Image.open(io.BytesIO(image.content)).convert("RGB")) for image in images]
    kept = [
        (image, picture)
        for image, picture in zip(images, pictures, strict=True)
        if image.role == "pool" and quality(picture).entropy >= ScreenConfig().min_entropy
    ]
    features = [describe_copies([picture for _, picture in kept[i : i + 64]]) for i in range(0, len(kept), 64)]
    return [image for image, _ in kept], np.concatenate(features)


def scores_of(images: list[PlantedImage]) -> list[Score]:
    """The scores at each threshold."""
    pool, features = described(images)
    originals = np.unique([image.original for image in pool], return_inverse=True)[1]
    cosines = np.triu(features @ features.T, 1)
    scores = []
    for threshold in THRESHOLDS:
        links = coo_matrix(cosines > threshold)
        count, component = connected_components(links, directed=False)
        dropped = len(pool) - count
        right = len(pool) - len({*zip(component.tolist(), originals.tolist(), strict=True)})
        scores.append(Score(right / max(dropped, 1), right / (len(pool) - originals.max() - 1)))
    return scores


def cosines_by_kind(images: list[PlantedImage]) -> dict[str, float]:
    """Mean cosine of copies to their originals."""
    pool, features = described(images)
    rows = {image.name: row for row, image in enumerate(pool)}
    pairs = [(image.kind, rows[image.name], rows[image.original]) for image in pool if image.original in rows]
    return {
        kind: float(np.mean([features[a] @ features[b] for other, a, b in pairs if other == kind]))
        for kind in sorted({kind for kind, a, b in pairs if a != b})
    }


def draw(scores: dict[str, list[list[Score]]], path: str) -> None:
    """Precision and recall over the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (name, seeds) in zip(axes, scores.items(), strict=True):
        for number, label in enumerate(Score._fields):
            values = np.array([[score[number] for score in of_seed] for of_seed in seeds])
            (line,) = axis.plot(THRESHOLDS, values.mean(axis=0), label=label)
            axis.fill_between(THRESHOLDS, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
        axis.axhline(0.95, color="grey", linewidth=0.7, linestyle="--")
        axis.set(title=name, xlabel="threshold of the cosine", ylim=(0.3, 1.01))
        axis.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
