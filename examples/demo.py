"""DINOv2 on two CPU cores in minutes: learn from patches of twenty photographs, without labels and without network.

    python examples/demo.py [--seed 0] [--output runs/demo] [--steps N]

The photographs are part of scikit-image and scikit-learn. A small ViT is pretrained on unlabelled patches of their left
halves. Then the ViT must tell which photograph a patch of a right half comes from, by its five nearest neighbours among
patches of the left halves. It has seen no pixel of the right halves.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from dinov2.data import BundledPhotographs
from dinov2.demo.patches import PatchProbe, cut_patches, handmade_accuracies
from dinov2.demo.plots import plot_curves, plot_rows
from dinov2.evaluate import dense_features, neighbourhood_features, pca_colours
from dinov2.models import VisionTransformer, load_pretrained
from dinov2.recipes import photos
from dinov2.train import PretrainConfig, pretrain, read_metrics

IN_THE_PICTURE = ("astronaut", "cat", "coffee", "flower", "motorcycle", "china")


def main() -> None:
    console = Console()
    config = configuration()
    # Such a small model gains nothing from a second thread, and a second thread makes it much slower on a busy machine.
    # The other core cuts the crops of the next batch.
    torch.set_num_threads(1)
    photographs = BundledPhotographs()
    pool = cut_patches(photographs, half="left", size=128, per_photograph=200, seed=3 * config.seed)
    index = cut_patches(photographs, half="left", size=32, per_photograph=100, seed=3 * config.seed + 1)
    queries = cut_patches(photographs, half="right", size=32, per_photograph=50, seed=3 * config.seed + 2)
    baselines = handmade_accuracies(index, queries)

    started = time.monotonic()
    run = pretrain(config, dataset=pool, probe=PatchProbe(index, queries, config.data.augmentation))
    minutes = (time.monotonic() - started) / 60

    metrics = read_metrics(run / "metrics.jsonl")
    measured = [line["knn_accuracy"] for line in metrics if "knn_accuracy" in line]
    baselines["untrained ViT"] = measured[0]
    plot_curves(metrics, baselines, run / "loss.png")
    untrained, trained = VisionTransformer(config.vit).eval(), load_pretrained(run / "teacher").eval()
    picture_features(photographs, untrained, trained, config, run)
    console.print(table({**baselines, f"ViT after {minutes:.1f} minutes": measured[-1]}))
    console.print(f"Pictures: {run / 'loss.png'}, {run / 'pca.png'}")


def configuration() -> PretrainConfig:
    """The recipe ``photos`` with the options of the command line."""
    recipe = photos()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole demo (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the run (default: a new one in runs/)")
    arguments = parser.parse_args()
    if arguments.output and arguments.output.exists():
        parser.error(f"--output: expected a new folder, got {str(arguments.output)!r}, which exists")
    output = arguments.output or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    return dataclasses.replace(recipe, seed=arguments.seed, steps=arguments.steps, output=output)


def picture_features(
    photographs: BundledPhotographs,
    untrained: VisionTransformer,
    trained: VisionTransformer,
    config: PretrainConfig,
    run: Path,
) -> None:
    """Write ``pca.png``: photographs, and the principal components of their patch features, shown as colours."""
    images = [central_square(photographs[photographs.names.index(name)]) for name in IN_THE_PICTURE]
    views = config.data.augmentation
    maps = {
        "untrained ViT: patch tokens": [dense_features(untrained, image, views, stride=8) for image in images],
        "trained ViT: patch tokens": [dense_features(trained, image, views, stride=8) for image in images],
        "trained ViT: class tokens of 32 pixels around": [
            neighbourhood_features(trained, image, views, stride=8) for image in images
        ],
    }
    colours = {name: [colour.numpy() for colour in pca_colours(features)] for name, features in maps.items()}
    plot_rows({"photographs": images, **colours}, run / "pca.png")


def central_square(photograph: npt.NDArray[np.uint8], side: int = 256) -> npt.NDArray[np.uint8]:
    """The middle of a photograph, uint8 ``[side, side, 3]``."""
    top, left = (photograph.shape[0] - side) // 2, (photograph.shape[1] - side) // 2
    return photograph[top : top + side, left : left + side]


def table(accuracies: dict[str, float]) -> Table:
    """The accuracies, with random guessing in the first row."""
    result = Table("Which of twenty photographs does this patch come from?")
    result.add_column("5-NN accuracy", justify="right")
    for name, accuracy in {"guessing": 1 / 20, **accuracies}.items():
        result.add_row(name, f"{accuracy:.1%}")
    return result


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The next demo starts from the beginning.") from None
