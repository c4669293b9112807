"""``dinov2 export``: write the weights of a run as files that anyone can read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dinov2.cli.checks import check_output, check_weights
from dinov2.cli.counting import at_least
from dinov2.interrupts import uninterrupted

EXAMPLES = """examples:
  dinov2 export runs/first first                         export the teacher of the newest checkpoint
  dinov2 export runs/first first --heads                 export its heads too, to distil from it or to go on with it
  dinov2 export runs/first early --step 5000             export an earlier checkpoint, if it was kept
  dinov2 export runs/small base --student vit_base       export one of several distilled students
  dinov2 export runs/first for_hf --format transformers   write what AutoModel.from_pretrained("for_hf") reads
  dinov2 export dinov2_vits14_pretrain.pth vits14        convert facebook's weights (or transformers', timm's)

Read it back with dinov2.models.load_pretrained("first"), whatever its format."""


def run(arguments: Sequence[str]) -> None:
    """Export, or print the help."""
    options = parser().parse_args(arguments or ["--help"])
    check_output(options.output)
    if options.step is None:  # which only a run has
        check_weights(options.source)
    with uninterrupted():  # after the help and the checks, which need no PyTorch
        from dinov2.train.networks import export

    folder = export(
        options.source,
        options.output,
        network=options.network,
        student=options.student,
        step=options.step,
        heads=options.heads,
        format=options.format,
    )
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")


def parser() -> argparse.ArgumentParser:
    """The parser of ``dinov2 export``."""
    result = argparse.ArgumentParser(
        "dinov2 export",
        description="Write a backbone as model.safetensors and config.json.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "source",
        type=Path,
        help="read the weights from here: the directory of a run, a checkpoint in it, or other weights",
    )
    result.add_argument("output", type=Path, help="write into this folder, which must be new or empty")
    result.add_argument(
        "--step", type=at_least(0), help="take the checkpoint after this many steps (default: the newest)"
    )
    result.add_argument("--heads", action="store_true", help="also write heads.safetensors: heads, prototypes, centres")
    result.add_argument(
        "--network", choices=["teacher", "student"], default="teacher", help="write this network (default: teacher)"
    )
    result.add_argument(
        "--format",
        choices=["facebook", "transformers", "timm"],
        default="facebook",
        help="write for this library's loader (default: facebook's names and our configuration)",
    )
    result.add_argument("--student", metavar="NAME", help="name the student, where a distillation has several")
    return result
