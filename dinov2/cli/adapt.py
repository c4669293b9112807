"""``dinov2 adapt``: continue a pretrained run with larger images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dinov2.cli.counting import at_least
from dinov2.cli.run_options import Arguments, parse_fields, saved_config, start, take_options
from dinov2.recipes import adaptation
from dinov2.recipes.building_on import folder_of
from dinov2.train import PretrainConfig

HELP = """usage: dinov2 adapt --from RUN --image_size PIXELS [--FIELD VALUE ...] [--resume] [--probe FOLDER]

Let a pretrained run go on with larger images. It runs its own recipe in 10,000 steps, at a tenth of its learning rate.

  --from RUN           go on from the newest checkpoint of this run: student, EMA teacher, heads and centres
  --image_size PIXELS  cut global crops of this side, a multiple of the patch size; local crops grow by the same factor

examples:
  dinov2 adapt --from runs/first --image_size 518                     write runs/first-518
  dinov2 adapt --from runs/first --image_size 518 --resume            continue after Ctrl-C, or anything worse
  dinov2 adapt --from runs/first --image_size 518 --steps 2000 --output runs/short --optim.base_lr 1e-4
  dinov2 adapt --from runs/first --image_size 518 --help              show every field with its value

A run writes its directory (--output) as dinov2 pretrain does, with the finished model in teacher/."""


def run(arguments: Sequence[str]) -> None:
    """Adapt, or print the help."""
    if not arguments or list(arguments) in (["-h"], ["--help"]):
        print(HELP)
        return
    start(parse(arguments))


def parse(options: Sequence[str]) -> Arguments[PretrainConfig]:
    """The configuration of the adapted run, changed by the options."""
    own, fields = take_options("dinov2 adapt", options, _declare)
    output = own.output or folder_of(own.run, own.image_size)
    config = saved_config(output, own.resume, PretrainConfig)
    if config is None:
        config = replace(adaptation(own.run, own.image_size), output=output)
    elif config.vit.img_size != own.image_size:
        raise ValueError(f"cannot resume in {output}: the run in it has images of {config.vit.img_size} pixels")
    return parse_fields(replace(config, output=output), fields, prog="dinov2 adapt", recipe=adaptation)


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="run", type=Path, required=True)
    parser.add_argument("--image_size", type=at_least(1), required=True)
