"""The common options of commands that train: every field of a configuration can be changed by its dotted path."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import tyro

from dinov2.cli import UsageError
from dinov2.cli.checks import check_device, check_images, check_output, check_weights, device_of
from dinov2.configuration import assembled, check
from dinov2.interrupts import uninterrupted
from dinov2.train import PretrainConfig, RunConfig
from dinov2.train.run_directory import check_run_directory, is_run, read_config

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Arguments(Generic[Config]):
    """The options of a command that trains."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue the run in the output directory from its newest checkpoint, or start it if it has none yet."""
    probe: Path | None = None
    """Measure k-NN accuracy on the way, on this folder of labelled images: train/CLASS/... and test/CLASS/..."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what the run needs (memory, arithmetic and bytes sent) and train nothing. Name the device if this machine
    lacks it, as in --device cuda."""
    world_size: int | None = None
    """With --dry_run, plan for this many processes; by default for those that torchrun started."""


WORDS = {
    "invalid literal for int() with base 10:": "expected a whole number, got",
    "could not convert string to float:": "expected a number, got",
}
"""Python's words in errors about an option, and ours."""


class TakenOptions(NamedTuple):
    """A command's own options, and the rest of the command line."""

    own: argparse.Namespace
    fields: list[str]


def parse_fields(
    config: Config, options: Sequence[str], *, prog: str, recipe: Callable[..., RunConfig]
) -> Arguments[Config]:
    """``config``, changed by the options.

    ``--help`` shows the recipe's docstring, and then every field with its value in ``config``.
    """
    description, _, _ = (inspect.getdoc(recipe) or "").partition("\n\nArgs:")
    config, options = choose_patch_head(config, options)
    kind: Any = Arguments[type(config)]  # type: ignore[misc]
    parsed: Arguments[Config] = read_options(kind, options, Arguments(config=config), prog, description)
    return parsed


def read_options(kind: Any, options: Sequence[str], default: Any, prog: str, description: str) -> Any:
    """``default``, changed by the options. It is of the dataclass ``kind``, which has a field ``config``.

    Raises:
        ValueError: a field is out of its bounds; the message names it in the spelling of the command line.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed = assembled(
                lambda: tyro.cli(
                    kind,
                    args=options,
                    default=default,
                    prog=prog,
                    description=description,
                    use_underscores=True,
                    config=(tyro.conf.AvoidSubcommands,),
                )
            )
    finally:
        text = said.getvalue()
        for words, ours in WORDS.items():
            text = text.replace(words, ours)
        sys.stderr.write(text)
    check(parsed.config)
    return parsed


def start(arguments: Arguments[Config]) -> None:
    """Run or resume the run that the command line describes."""
    config = arguments.config
    if arguments.world_size is not None and arguments.world_size < 1:
        raise UsageError(f"world_size: expected at least 1, got {arguments.world_size}")
    if arguments.dry_run:
        check_device(config.device, here=False)
        show_plan(config, arguments.world_size)
        return
    if arguments.world_size is not None:
        raise ValueError("--world_size goes with --dry_run; torchrun --nproc-per-node says how many processes train")
    check_places(arguments)
    check_device(config.device)
    with uninterrupted():
        from dinov2.evaluate import FolderProbe
        from dinov2.train import pretrain

    probe = FolderProbe(arguments.probe, config.data.augmentation) if arguments.probe else None
    pretrain(config, arguments.resume, probe=probe)


def check_places(arguments: Arguments[Config]) -> None:
    """Check that what a run reads is there, and that it may write what it writes, before PyTorch is imported.

    Raises:
        UsageError, OSError, ValueError: it is not, or it may not.
    """
    config = arguments.config
    check_output(config.output)
    if not arguments.resume and "WORLD_SIZE" not in os.environ:  # with it, another process may have begun to write
        check_run_directory(config, resume=False)
    check_images(config.data.root)
    if config.initial_weights is not None and not (arguments.resume and is_run(config.output)):
        check_weights(config.initial_weights)
    if arguments.probe is not None:
        for part in ("train", "test"):
            check_images(arguments.probe / part)


def show_plan(config: RunConfig, world_size: int | None) -> None:
    """Print what a run needs; only process 0 prints.

    Raises:
        ValueError: the run is a distillation, a variable of torchrun is no number, or the batch does not split evenly
            among the processes.
    """
    if not isinstance(config, PretrainConfig):
        raise ValueError(f"--dry_run plans the training of one student and its teacher, but this is a {config.kind}")
    with uninterrupted():
        from dinov2.train.planning import plan, print_plan
        from dinov2.train.processes import number_in

    if number_in("RANK", 0) == 0:
        world_size = world_size or number_in("WORLD_SIZE", 1)
        print_plan(plan(config, world_size=world_size, device_type=device_of(config.device, here=False).type))


def choose_patch_head(config: Config, options: Sequence[str]) -> tuple[Config, list[str]]:
    """Add the iBOT head if an option names one of its fields; ``--ibot_head None`` removes it.

    tyro itself neither adds nor removes an optional section.
    """
    names = [option.partition("=")[0].replace("-", "_") for option in options]
    if config.ibot_head is None and any(name.startswith("__ibot_head.") for name in names):
        config = dataclasses.replace(config, ibot_head=config.dino_head)
    if "__ibot_head" in names:
        place = names.index("__ibot_head")
        if list(options[place + 1 : place + 2]) == ["None"]:
            return dataclasses.replace(config, ibot_head=None), [*options[:place], *options[place + 2 :]]
    return config, list(options)


def take_options(prog: str, options: Sequence[str], add: Callable[[argparse.ArgumentParser], None]) -> TakenOptions:
    """Take a command's own options out of its command line: ``--output``, ``--resume`` and those that ``add`` declares.

    The remaining options are fields of the configuration, whose defaults depend on the command's own options.
    """
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False, usage=f"{prog} --help")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true")
    add(parser)
    own, fields = parser.parse_known_args(options)
    return TakenOptions(own, [*fields, "--resume"] if own.resume else fields)


def saved_config(output: Path, resume: bool, kind: type[Config]) -> Config | None:
    """The saved configuration of the run to resume, or None for a new run. A resumed run does not need its sources.

    Raises:
        ValueError: the directory holds a run of another kind.
    """
    if not resume or not is_run(output):
        return None
    config = read_config(output)
    if not isinstance(config, kind):
        raise ValueError(f"cannot resume in {output}: the run in it is a {config.kind}")
    return config
