"""``dinov2 pretrain RECIPE``: run or resume a recipe; options change its fields."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from dinov2.cli.run_options import Arguments, parse_fields, start
from dinov2.recipes import RECIPES, recipe
from dinov2.train import PretrainConfig


def run(arguments: Sequence[str]) -> None:
    """Pretrain, or print the help."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *options = arguments
    start(parse(name, options))


def parse(name: str, options: Sequence[str]) -> Arguments[PretrainConfig]:
    """The recipe ``name``, changed by the options."""
    return parse_fields(recipe(name), options, prog=f"dinov2 pretrain {name}", recipe=RECIPES[name])


def help_text() -> str:
    """The text of ``dinov2 pretrain --help``."""
    width = max(map(len, RECIPES))
    recipes = "\n".join(
        f"  {name:<{width}}  {(inspect.getdoc(function) or '').splitlines()[0]}" for name, function in RECIPES.items()
    )
    return (
        "usage: dinov2 pretrain RECIPE [--FIELD VALUE ...] [--resume] [--probe FOLDER]\n\n"
        "Train a ViT on images without labels (DINOv2).\n\n"
        f"recipes:\n{recipes}\n\n"
        "examples:\n"
        "  dinov2 pretrain photos                                  start, on bundled photographs\n"
        "  dinov2 pretrain photos --resume                         continue after Ctrl-C, or anything worse\n"
        "  dinov2 pretrain photos --steps 2000 --output runs/long  change any field\n"
        "  dinov2 pretrain vits14_small_data --data.root PHOTOS    train on your own folder of images\n"
        "  dinov2 pretrain vits14_small_data --initial_weights W   start from weights that you have\n"
        "  dinov2 pretrain vitl16_short --dry_run --world_size 8   print what a run needs; train nothing\n"
        "  dinov2 pretrain photos --help                           show every field of a recipe with its value\n\n"
        "A run writes its directory (--output): config.json, metrics.jsonl, tensorboard/, checkpoints/\n"
        "and, at the end, teacher/: model.safetensors and its config.json."
    )
