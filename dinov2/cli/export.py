"""``dinov2 export``: weights of a run as files that anyone can read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  dinov2 export runs/first first                        the teacher of the newest checkpoint
  dinov2 export runs/first first --heads                with its heads, to distil from it or to go on with it
  dinov2 export runs/first early --step 5000            an earlier checkpoint, if it was kept
  dinov2 export runs/small base --student vit_base      one of several distilled students
  dinov2 export runs/first for_hf --format transformers  for AutoModel.from_pretrained("for_hf")
  dinov2 export dinov2_vits14_pretrain.pth vits14       facebook's weights (or transformers', timm's) in this form

Read it back with dinov2.models.load_pretrained("first"), whatever its format."""


def run(arguments: Sequence[str]) -> None:
    """Export, or explain how."""
    options = parser().parse_args(arguments or ["--help"])
    from dinov2.train.networks import export  # after the help, which needs no PyTorch

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
    """What may follow ``dinov2 export``."""
    result = argparse.ArgumentParser(
        "dinov2 export",
        description="Write a backbone as model.safetensors and config.json.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("source", type=Path, help="directory of a run, a checkpoint in it, or other weights")
    result.add_argument("output", type=Path, help="folder to write, new or empty")
    result.add_argument("--step", type=int, help="the checkpoint after so many steps (default: the newest)")
    result.add_argument("--heads", action="store_true", help="also write heads.safetensors: heads, prototypes, centres")
    result.add_argument(
        "--network", choices=["teacher", "student"], default="teacher", help="which network (default: teacher)"
    )
    result.add_argument(
        "--format",
        choices=["facebook", "transformers", "timm"],
        default="facebook",
        help="whose loader shall read it (default: facebook's names and our configuration)",
    )
    result.add_argument("--student", metavar="NAME", help="which student of a distillation with several")
    return result
