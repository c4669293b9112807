"""``dinov2 distill``: students of a frozen teacher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dinov2.cli import UsageError
from dinov2.cli.checks import check_weights
from dinov2.cli.run_options import Arguments, parse_fields, saved_config, start, take_options
from dinov2.models.config import ARCHITECTURES
from dinov2.recipes import distillation
from dinov2.train import DistillConfig

HELP = f"""usage: dinov2 distill --teacher WEIGHTS --student NAME [NAME ...]
                      [--FIELD VALUE ...] [--resume] [--probe FOLDER]

Let small ViTs learn from a large, frozen one. This gives better models than training from scratch.

  --teacher WEIGHTS     learn from this run, checkpoint or export with heads, or facebook's teacher_checkpoint.pth
  --student NAME [...]  train {", ".join(ARCHITECTURES)}; several learn from one pass of the teacher

examples:
  dinov2 distill --teacher runs/large --student vit_small                start, on the images of that run
  dinov2 distill --teacher runs/large --student vit_small --resume       continue after Ctrl-C, or anything worse
  dinov2 distill --teacher runs/large --student vit_small vit_base       train two students in one run
  dinov2 distill --teacher large_with_heads --student vit_small --data.root IMAGES --output runs/small
  dinov2 distill --teacher runs/large --student vit_small --students.vit_small.depth 6 --steps 50000
  dinov2 distill --teacher runs/large --student vit_small --help         show every field with its value

A run writes its directory (--output) as dinov2 pretrain does, with the finished models in students/NAME/."""


def run(arguments: Sequence[str]) -> None:
    """Distil, or print the help."""
    if not arguments or list(arguments) in (["-h"], ["--help"]):
        print(HELP)
        return
    start(parse(arguments))


def parse(options: Sequence[str]) -> Arguments[DistillConfig]:
    """The configuration of the distillation, changed by the options."""
    own, fields = take_options("dinov2 distill", options, _declare)
    if len({*own.student}) < len(own.student):
        raise UsageError(f"student: expected different names, got {' '.join(own.student)}")
    output = own.output or Path("runs") / "-".join(own.student)
    config = saved_config(output, own.resume, DistillConfig)
    if config is None:
        check_weights(own.teacher)
        config = distillation(own.teacher, own.student)
    elif list(config.students) != own.student:
        raise ValueError(f"cannot resume in {output}: the students in it are {', '.join(config.students)}")
    config = replace(config, output=output, frozen_teacher=own.teacher)
    return parse_fields(config, fields, prog="dinov2 distill", recipe=distillation)


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", nargs="+", required=True)
