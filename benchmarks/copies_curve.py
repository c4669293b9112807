"""How many copies the built-in features propose, over the threshold.

    python -m benchmarks.copies_curve FOLDER... [--png PNG]

Each folder has photographs that are no copies of each other. One copy of each kind is made of some of them. The table
and the curve show, at each threshold of the cosine, the share of copies whose photograph is proposed (it is above the
threshold and among the nearest), and the number of other photographs that are proposed, which the check of pictures has
to refuse.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.copies_of_photographs import KINDS
from dinov2.curate.copies.features import describe_copies
from dinov2.curate.views import SMALL_SIDE
from dinov2.recipes import laptop

THRESHOLDS = np.arange(0.1, 0.71, 0.05)
COPIED = 100  # photographs of a folder of which copies are made
Floats = npt.NDArray[np.float32]


class Curve(NamedTuple):
    """Values at each threshold.

    Attributes:
        recall: share of copies whose photograph is proposed, the mean over the kinds.
        worst: the same for the kind with the smallest share.
        proposed: other photographs that are proposed for a photograph.
    """

    recall: list[float]
    worst: list[float]
    proposed: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of photographs")
    parser.add_argument("--png", type=Path, help="draw the curves into this file")
    arguments = parser.parse_args()
    curves = {folder.name: curve(folder) for folder in arguments.folders}
    for name, found in curves.items():
        print(f"\n{name}: threshold, recall in the mean of the kinds, of the worst kind, others proposed an image")
        for threshold, *values in zip(THRESHOLDS, *found, strict=True):
            print("  {:.2f}  {:.3f}  {:.3f}  {:6.2f}".format(threshold, *values))
    if arguments.png:
        draw(curves, arguments.png)


def curve(folder: Path) -> Curve:
    """The curve of a folder."""
    rng, neighbours = np.random.default_rng(0), laptop().dedup.neighbours
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]
    for picture in pictures:
        picture.thumbnail((2 * SMALL_SIDE, 2 * SMALL_SIDE))
    features = described(pictures)
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1)
    nearest = -np.sort(-cosines, axis=1)[:, :neighbours]
    copied = rng.permutation(len(pictures))[:COPIED]
    recalls = []
    for make in KINDS.values():
        found = described([make(pictures[number], rng) for number in copied]) @ features.T  # [copies, photographs]
        own = found[np.arange(len(copied)), copied]
        is_near = (found > own[:, None]).sum(axis=1) < neighbours
        recalls.append([float((is_near & (own > threshold)).mean()) for threshold in THRESHOLDS])
    by_kind = np.array(recalls)
    proposed = [float((nearest > threshold).sum(axis=1).mean()) for threshold in THRESHOLDS]
    return Curve(by_kind.mean(axis=0).tolist(), by_kind.min(axis=0).tolist(), proposed)


def described(pictures: list[Image.Image]) -> Floats:
    """Features of pictures at the size at which a curation sees them."""
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((SMALL_SIDE, SMALL_SIDE), Image.Resampling.HAMMING)
    arrays = [np.asarray(picture) for picture in small]
    return np.concatenate([describe_copies(arrays[start : start + 64]) for start in range(0, len(arrays), 64)])


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Recall, and other photographs proposed, over the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name, found in curves.items():
        (line,) = left.plot(THRESHOLDS, found.recall, label=name)
        left.plot(THRESHOLDS, found.worst, color=line.get_color(), linestyle=":", linewidth=1)
        right.plot(THRESHOLDS, found.proposed, label=name)
    for axis in (left, right):
        axis.axvline(laptop().dedup.threshold, color="grey", linewidth=0.7, linestyle="--")
        axis.set_xlabel("threshold of the cosine")
    left.set(ylabel="share of copies proposed", ylim=(0.4, 1.01), title="mean of ten kinds (dotted: the worst)")
    right.set(ylabel="others proposed an image", title="work for the check")
    left.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
