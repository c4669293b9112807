"""``dinov2 embed``: features of all images of a folder or of shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dinov2.cli.checks import check_images, check_weights, device_of
from dinov2.cli.counting import at_least, counting_bar
from dinov2.interrupts import uninterrupted

DESCRIPTION = """Write the class token of every image into OUTPUT/features.npy (float32, one row per image), the images'
names into OUTPUT/images.csv, and the names of unreadable images, with the reasons, into OUTPUT/skipped.csv. Bytes of a
name that are not UTF-8 are written as \\xNN.

The model sees the centre of each image: the shorter side is resized to 8/7 of --size, then SIZE x SIZE pixels are cut
from the middle and normalised."""

EXAMPLES = """examples:
  dinov2 embed runs/first/teacher photos features              embed a folder of images by the teacher of a run
  dinov2 embed dinov2_vits14_pretrain.pth pool features        embed tar shards by facebook's weights
  dinov2 embed vits14 s3://bucket/pool features --size 518     show the model larger images
  dinov2 embed runs/bands/teacher tiles features --mean 0.1 0.2 --std 0.05 0.07    use a model of two channels

Read it back with numpy.load("features/features.npy")."""


def run(arguments: Sequence[str]) -> None:
    """Embed, or print the help."""
    options = parser().parse_args(arguments or ["--help"])
    check_weights(options.model)
    check_images(options.images)
    with uninterrupted():  # after the help and the checks, which need no PyTorch
        from dinov2.data import AugmentationConfig, DataConfig, image_names, open_dataset
        from dinov2.data.files import shown
        from dinov2.evaluate import embed
        from dinov2.models import load_pretrained
        from dinov2.train.precision import Arithmetic

    device = device_of(options.device)
    model = load_pretrained(options.model).eval().to(device)
    augmentation = AugmentationConfig(
        global_size=options.size or model.config.img_size, mean=tuple(options.mean), std=tuple(options.std)
    )
    dataset = open_dataset(DataConfig(root=options.images, augmentation=augmentation))
    console = Console()
    with counting_bar("image", console) as bar, Arithmetic(options.precision, device).autocast():
        task = bar.add_task("", total=len(dataset))
        written = embed(
            model,
            dataset,
            image_names(dataset),
            options.output,
            augmentation,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            progress=lambda images: bar.update(task, completed=images),
        )
    console.print(
        f"wrote {written.images:,} features of {written.width} numbers to {shown(str(options.output))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if written.skipped:
        console.print(
            f"{written.skipped:,} images cannot be read: {shown(str(options.output / 'skipped.csv'))}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def parser() -> argparse.ArgumentParser:
    """The parser of ``dinov2 embed``."""
    result = argparse.ArgumentParser(
        "dinov2 embed",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help="read the model from here: weights of any kind that load_pretrained reads",
    )
    result.add_argument(
        "images",
        metavar="IMAGES",
        help="read the images from here: a folder of images, or a folder or URL of tar shards or of a curation",
    )
    result.add_argument(
        "output", metavar="OUTPUT", type=Path, help="write into this folder, which must be new or empty"
    )
    result.add_argument(
        "--size", type=at_least(1), help="show the model squares of this many pixels (default: the model's own size)"
    )
    for name, verb, default in (
        ("mean", "subtract this from each channel", (0.485, 0.456, 0.406)),
        ("std", "divide each channel by this", (0.229, 0.224, 0.225)),
    ):
        help_text = f"{verb}, as in training (default: {' '.join(map(str, default))})"
        result.add_argument(f"--{name}", type=float, nargs="+", default=default, help=help_text)
    result.add_argument("--batch_size", type=at_least(1), default=64, help="run this many images at once (default: 64)")
    result.add_argument(
        "--num_workers",
        type=at_least(0),
        default=2,
        help="read and decode in this many processes; 0 takes this one (default: 2)",
    )
    result.add_argument(
        "--device", default="auto", help="run the model here: cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    result.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="run the model in this precision (default: bf16 on a GPU, fp32 on the CPU)",
    )
    return result
