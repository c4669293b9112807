"""``dinov2 pretrain RECIPE``: a recipe, any of its fields changed, run or resumed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dinov2.evaluate import FolderProbe
from dinov2.recipes import RECIPES, recipe
from dinov2.train import PretrainConfig, pretrain


@dataclass(frozen=True)
class Arguments:
    """What may follow ``dinov2 pretrain RECIPE``."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in the output directory from its newest checkpoint (or start it, if it has none yet)."""
    probe: Path | None = None
    """Folder of labelled images, train/CLASS/... and test/CLASS/..., whose k-NN accuracy is measured on the way."""


def run(arguments: Sequence[str]) -> None:
    """Pretrain, or explain how."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return
    name, *options = arguments
    parsed = parse(name, options)
    config = parsed.config
    probe = FolderProbe(parsed.probe, config.data.augmentation) if parsed.probe else None
    pretrain(config, parsed.resume, probe=probe)


def parse(name: str, options: Sequence[str]) -> Arguments:
    """The recipe ``name`` with the overrides of the command line."""
    config, options = choose_patch_head(recipe(name), options)
    return tyro.cli(
        Arguments,
        args=options,
        default=Arguments(config=config),
        prog=f"dinov2 pretrain {name}",
        description=inspect.getdoc(RECIPES[name]),
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )


def choose_patch_head(config: PretrainConfig, options: Sequence[str]) -> tuple[PretrainConfig, list[str]]:
    """Add the head of the masked patches where an option names one of its fields; ``--ibot_head None`` shares instead.

    tyro leaves an optional section as present or as absent as it finds it.
    """
    names = [option.partition("=")[0].replace("-", "_") for option in options]
    if config.ibot_head is None and any(name.startswith("__ibot_head.") for name in names):
        config = dataclasses.replace(config, ibot_head=config.dino_head)
    if "__ibot_head" in names:
        place = names.index("__ibot_head")
        if list(options[place + 1 : place + 2]) == ["None"]:
            return dataclasses.replace(config, ibot_head=None), [*options[:place], *options[place + 2 :]]
    return config, list(options)


def help_text() -> str:
    """What ``dinov2 pretrain --help`` prints."""
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
        "  dinov2 pretrain vits14_small_data --data.root PHOTOS    your own folder of images, of any nesting\n"
        "  dinov2 pretrain photos --help                           every field of a recipe, with its value\n\n"
        "A run writes its directory (--output): config.json, metrics.jsonl, tensorboard/, checkpoints/\n"
        "and, at the end, teacher/: model.safetensors and its config.json."
    )
