"""``dinov2 curate``: from pages, links or images to a set to pretrain on, all stages or one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from dinov2.cli.curation_progress import Progress, table
from dinov2.curate import STAGES, CurateConfig, curate, only, run_steps, save_config, write_report

EXAMPLES = """examples:
  dinov2 curate run laptop --images photos --output curated     a folder of your own images, every stage
  dinov2 curate run laptop --pages crawl --output curated       from web pages: HTML, WARC or WAT files
  dinov2 curate run curated/config.json                         go on after Ctrl-C, or anything worse
  dinov2 curate dedup curated/config.json                       one stage, where those before it are done
  dinov2 curate run lvd142m --pages s3://crawl --output s3://curated --engine.kind ray    on a cluster
  dinov2 curate run curated/config.json --shard 3/64            one of 64 jobs that share the work
  dinov2 curate report curated/config.json                      write the report of what is there
  dinov2 curate run laptop --help                               every setting, with its value
  dinov2 pretrain vits14_small_data --data.root curated/set     then train on it

What is done is not done again: results lie in folders named after their settings, and a changed setting makes anew only
what depends on it."""

SHARE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Arguments:
    """What may follow the name of a configuration."""

    config: Annotated[CurateConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    shard: str = "0/1"
    """I/N: make only every N-th shard of each step, from the I-th on (counted from 0), and wait for the others."""


def run(arguments: Sequence[str]) -> None:
    """Curate, or explain how."""
    if len(arguments) < 2 or arguments[0] in ("-h", "--help") or arguments[1] in ("-h", "--help"):
        print(help_text())
        return
    what, name, *options = arguments
    if what not in ("run", "report", *STAGES):
        raise ValueError(f"expected run, report or a stage ({', '.join(STAGES)}), got {what!r}")
    parsed = parse(what, name, options)
    console = Console()
    config, part = parsed.config, share(parsed.shard)
    progress = Progress(console)
    if what == "report":
        console.print(f"report: {write_report(config)}", soft_wrap=True, highlight=False, markup=False)
        return
    save_config(config)
    settings = {"part": part, "tries": config.engine.tries, "patience": config.engine.patience, "watcher": progress}
    with progress:
        if what == "run":
            run_steps(curate(config), config.engine.open(), **settings)
        else:
            run_steps(only(curate(config), what), config.engine.open(), **settings)
    console.print(table(progress.steps))
    if part.number == 0:
        console.print(f"report: {write_report(config)}", soft_wrap=True, highlight=False, markup=False)
