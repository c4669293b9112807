"""``dinov2 curate``: turn pages, links or images into a set to pretrain on, in all stages or one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from rich.console import Console
from rich.filesize import decimal

from dinov2.cli.checks import check_device, check_output
from dinov2.cli.curation_progress import Progress, table
from dinov2.cli.run_options import read_options
from dinov2.configuration import read_json
from dinov2.curate import STAGES, CurateConfig, Part, curate, only, run_steps
from dinov2.curate.cleaning import leftovers, remove
from dinov2.curate.early import check_early
from dinov2.curate.materialize import NothingLeftError
from dinov2.curate.pipeline import save_config
from dinov2.curate.report import write_report
from dinov2.data.files import shown
from dinov2.data.outputs import CONFIG, DROPPED, FATES
from dinov2.recipes import CURATIONS, curation

EXAMPLES = """examples:
  dinov2 curate run laptop --images photos --output curated     run every stage on a folder of your own images
  dinov2 curate run laptop --pages crawl --output curated       start from web pages: HTML, WARC or WAT files
  dinov2 curate run laptop --images photos --seeds mine --evaluation_sets test    keep what is like mine and unlike test
  dinov2 curate run curated/config.json                         go on after Ctrl-C, or anything worse
  dinov2 curate dedup curated/config.json                       run one stage, where those before it are done
  dinov2 curate run curated/config.json --shard 3/64            run one of 64 jobs that share the work
  dinov2 curate run curated/config.json --engine.kind ray       run on a cluster
  dinov2 curate report curated/config.json                      write the report of what is there
  dinov2 curate clean curated/config.json                       list what earlier settings left; --yes removes it
  dinov2 curate run laptop --help                               show every setting with its value

Finished work is not repeated: each result has a folder named after its settings, and a changed setting repeats only the
steps that depend on it. The last line of the output names the set, for dinov2 pretrain --data.root."""

Parsed = TypeVar("Parsed", "Arguments", "CleanArguments")
SHARE = re.compile(r"(\d+)/(\d+)", re.ASCII)


@dataclass(frozen=True)
class Arguments:
    """The options after the name of a configuration."""

    config: Annotated[CurateConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    shard: str = "0/1"
    """Make only every N-th shard of each step, from the I-th on (counted from 0), and wait for the others: I/N."""


@dataclass(frozen=True)
class CleanArguments:
    """The options of ``dinov2 curate clean``."""

    config: Annotated[CurateConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    keep: tuple[str, ...] = ()
    """Also keep what the configurations in these files need."""
    final_sets: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove the final sets of other configurations as well; see that nobody trains on them."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove what is listed; otherwise the command removes nothing."""


def run(arguments: Sequence[str]) -> None:
    """Curate, or print the help."""
    if len(arguments) < 2 or arguments[0] in ("-h", "--help") or arguments[1] in ("-h", "--help"):
        print(help_text())
        return
    what, name, *options = arguments
    if what not in ("run", "report", "clean", *STAGES):
        raise ValueError(f"expected run, report or a stage ({', '.join(STAGES)}), or clean, got {what!r}")
    console = Console()
    if what == "clean":
        clean(parse(CleanArguments, what, name, options), console)
        return
    parsed = parse(Arguments, what, name, options)
    config, part = parsed.config, share(parsed.shard)
    if what == "report":
        report(console, config)
        return
    for stage in ("embed_copies", "embed"):
        device, is_elsewhere = getattr(config, stage).device, config.engine.kind == "ray"
        check_device(device, field=f"{stage}.device", here=not is_elsewhere)
    check_early(config, STAGES if what == "run" else (what,))
    if "://" not in config.output:
        check_output(Path(config.output))
    save_config(config)
    nothing: NothingLeftError | None = None
    tries, patience = config.engine.tries, config.engine.patience
    with config.engine.open() as engine, Progress(console) as progress:
        try:
            if what != "run":
                stages = only(curate(config, check=()), what)
                run_steps(stages, engine, tries=tries, part=part, patience=patience, watcher=progress)
            else:
                steps = curate(config, check=())
                made = run_steps(steps, engine, tries=tries, part=part, patience=patience, watcher=progress)
        except NothingLeftError as error:  # the report says why
            nothing = error
    if progress.steps:
        console.print(table(progress.steps))
    else:
        say(console, f"this curation has nothing to {what}")
    if part.number == 0:
        report(console, config)
    if nothing is not None:
        raise nothing
    if what == "run":
        say(console, f"train on it: dinov2 pretrain vits14_small_data --data.root {shown(str(made.root))}")


def report(console: Console, config: CurateConfig) -> None:
    """Write the report and the tables beside it, and print where they are."""
    page = write_report(config)
    say(console, f"report: {shown(page)}")
    for what, name in (("every image and its fate", FATES), ("names and reasons of dropped images", DROPPED)):
        say(console, f"{what}: {shown(f'{config.output}/{name}')}")


def clean(arguments: CleanArguments, console: Console) -> None:
    """List, and perhaps remove, what no configuration needs."""
    config = arguments.config
    found = leftovers([config, *map(read_config, arguments.keep)])
    going = found.folders | (found.final_sets if arguments.final_sets else {})
    for path, size in (*going.items(), *found.files.items()):
        say(console, f"{decimal(size):>10}  {shown(path)}")
    for path in found.links:
        say(console, f"{'kept':>10}  {shown(path)}, which is a link")
    for path, size in () if arguments.final_sets else found.final_sets.items():
        say(console, f"{'kept':>10}  {shown(path)}, a final set of {decimal(size)}: --final_sets removes it too")
    total = f"{len(going)} folders and {len(found.files)} half-written files, {decimal(sum(going.values()))}"
    if arguments.yes:
        remove(config.output, (*going, *found.files))
        say(console, f"removed {total}")
    elif going or found.files:
        say(console, f"{total}: --yes removes them")
    else:
        say(console, "there is nothing to remove")


def parse(kind: type[Parsed], what: str, name: str, options: Sequence[str]) -> Parsed:
    """A curation by its name or by the ``config.json`` of an earlier one, changed by the options."""
    description = ""
    if name not in CURATIONS and (Path(name) / CONFIG).is_file():
        raise ValueError(f"expected a curation or its {CONFIG}, got the folder {name}: give {Path(name) / CONFIG}")
    if name in CURATIONS or not name.endswith(".json"):
        config = curation(name)
        description = inspect.getdoc(CURATIONS[name]) or ""
    else:
        config = read_config(name)
    parsed: Parsed = read_options(kind, options, kind(config=config), f"dinov2 curate {what} {name}", description)
    return parsed


def read_config(path: str) -> CurateConfig:
    """The configuration in a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not the configuration of a curation.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path}; the curations are {', '.join(CURATIONS)}")
    try:
        return read_json(file, "a curation", lambda values: CurateConfig)
    except RecursionError:
        raise ValueError(f"{file} is not the configuration of a curation: it is nested too deeply") from None


def share(text: str) -> Part:
    """The part of the work that ``I/N`` names.

    Raises:
        ValueError: the text is not I/N with 0 <= I < N.
    """
    found = SHARE.fullmatch(text)
    if not found:
        raise ValueError(f"shard: expected I/N, such as 3/64, got {text!r}")
    return Part(*map(int, found.groups()))


def say(console: Console, line: str) -> None:
    """Print a line without wrapping it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def help_text() -> str:
    """The text of ``dinov2 curate --help``."""
    width = max(map(len, CURATIONS))
    curations = "\n".join(
        f"  {name:<{width}}  {(inspect.getdoc(function) or '').splitlines()[0]}" for name, function in CURATIONS.items()
    )
    return (
        "usage: dinov2 curate run|report|clean|STAGE CURATION|CONFIG.json [--FIELD VALUE ...] [--shard I/N]\n\n"
        "Make a set to pretrain on: find, download, screen, deduplicate and retrieve images.\n\n"
        f"stages, in order: {', '.join(STAGES)}\n\n"
        f"curations:\n{curations}\n\n"
        f"{EXAMPLES}"
    )
