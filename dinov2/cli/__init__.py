"""The command line, ``dinov2 COMMAND``: each command is a module of this package with a function ``run(arguments)``."""

from __future__ import annotations

import difflib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COMMANDS = {
    "pretrain": "train a ViT on images without labels",
    "distill": "train small ViTs that learn from a large one",
    "adapt": "let a pretrained ViT go on with larger images",
    "export": "write the weights of a run as files that anyone can read",
    "embed": "write the features that a model has for images",
    "curate": "make a set to pretrain on out of pages, links or images",
    "index": "write the index of images in tars, which training needs",
    "info": "show which kernels are built and which of them will run here",
}
"""Names and descriptions. A command's module is imported only when the command runs, so help appears at once."""

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what a terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f"did you mean {close[0]!r}? " if close else ""
        print(f"dinov2: unknown command {name!r}: {suggestion}see dinov2 --help", file=sys.stderr)
        return USAGE_ERROR
    try:
        with warnings_in_a_line(name):
            importlib.import_module(f"dinov2.cli.{name}").run(list(map(underscored, rest)))
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"dinov2 {name}: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt as interruption:
        print(f"dinov2 {name}: {interruption}" if str(interruption) else f"dinov2 {name}: stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def underscored(argument: str) -> str:
    """An option in the spelling of help and documentation: ``--batch-size=4`` becomes ``--batch_size=4``."""
    if not argument.startswith("--"):
        return argument
    name, mark, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{mark}{value}"


@contextmanager
def warnings_in_a_line(command: str) -> Iterator[None]:
    """Show warnings of this package in one line, like errors. Other warnings also show their place in the code."""
    before = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category.__module__.startswith("dinov2."):
            return f"dinov2 {command}: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def help_text() -> str:
    """The text of ``dinov2 --help``."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {description}" for name, description in COMMANDS.items())
    return (
        "usage: dinov2 COMMAND [OPTIONS]\n\n"
        "DINOv2 learns features from images without labels.\n\n"
        f"commands:\n{commands}\n\n"
        "First steps:\n"
        "  dinov2 pretrain photos           train a small ViT on bundled photographs, in minutes on a CPU\n"
        "  dinov2 pretrain --help           list the recipes\n"
        "  dinov2 pretrain photos --help    show every setting of a recipe with its value"
    )
