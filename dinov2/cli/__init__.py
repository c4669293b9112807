"""The command line, ``dinov2 COMMAND``: each command is a module of this package with a function ``run(arguments)``."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dinov2.interrupts import uninterrupted

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
OUTPUT_GONE = 141  # 128 + SIGPIPE

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""PyTorch has no error type for memory of the CPU that ran out; its messages contain one of these."""


class UsageError(ValueError):
    """The command line cannot mean anything here; the exit code tells it from work that failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        code = run(arguments)
    except (SystemExit, BrokenPipeError):
        if not output_is_gone():
            raise
        return OUTPUT_GONE
    return OUTPUT_GONE if output_is_gone() else code


def run(arguments: Sequence[str] | None) -> int:
    """Run one command, say in one line what it could not do, and return its exit code."""
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
            with uninterrupted():  # PyTorch aborts the process if it is interrupted while it is imported
                command = importlib.import_module(f"dinov2.cli.{name}")
            command.run(list(map(underscored, rest)))
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"dinov2 {name}: {in_words(error)}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, UsageError) else FAILURE
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        reason = str(error).partition("\n")[0].rpartition("Allocator: ")[2] or "Python could not allocate an object"
        print(f"dinov2 {name}: expected more memory than there is: {reason}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt as interruption:
        print(f"dinov2 {name}: {interruption}" if str(interruption) else f"dinov2 {name}: stopped", file=sys.stderr)
        return INTERRUPTED
    return 0


def output_is_gone() -> bool:
    """Whether whoever read the output has ended, as ``head`` does. Then nothing more is written, not even at exit."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # there is none, or it is no file
        return False
    poll = select.poll()
    poll.register(number, 0)  # errors are always reported
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def in_words(error: Exception) -> str:
    """An error for people: the system's errors without numbers and with the file in front."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


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
