"""``dinov2 index``: write the index of images in tars, which training needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dinov2.cli.counting import counting_bar

if TYPE_CHECKING:
    from dinov2.data import ShardReport

DESCRIPTION = """Write ROOT/index/NAME.parquet for every tar of images ROOT/NAME.tar, or ROOT/images/NAME.tar.

An index has the place of each image in its tar, so training can read images in any order, each by one read. The command
reads each tar once and does not change it. It skips tars with an index, so a second call finishes an interrupted one.
To index a tar that has changed, delete its index first."""

EXAMPLES = """examples:
  dinov2 index pool                                       index a folder of tars, as img2dataset or tar wrote them
  dinov2 index s3://bucket/pool                           index any URL of fsspec; its protocol may need a package
  dinov2 pretrain vits14_small_data --data.root pool      then train on it"""


def run(arguments: Sequence[str]) -> None:
    """Index, or print the help."""
    options = parser().parse_args(arguments or ["--help"])
    from dinov2.data import DamagedTarsError, index_shards
    from dinov2.data.folders import is_of_tars
    from dinov2.data.shards.storage import Storage

    console = Console()
    try:
        with counting_bar("shard", console) as bar:
            task = bar.add_task("", total=None)
            report = index_shards(options.root, lambda done, of: bar.update(task, completed=done, total=of))
    except DamagedTarsError as error:
        console.print(table(error.report))
        raise
    console.print(table(report))
    storage = Storage(options.root)
    is_of_tars(storage, options.root, storage.paths())  # says if images lie beside the tars


def parser() -> argparse.ArgumentParser:
    """The parser of ``dinov2 index``."""
    result = argparse.ArgumentParser(
        "dinov2 index",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("root", metavar="ROOT", help="index the tars in this folder or under this URL")
    return result


def table(report: ShardReport) -> Table:
    """A table of indexed and skipped files."""
    result = Table(box=SIMPLE_HEAD)
    result.add_column("")
    result.add_column("number", justify="right")
    result.add_row("[bold]images indexed[/bold]", f"[bold]{report.images:,}[/bold]")
    result.add_row("shards indexed", f"{report.shards:,}")
    if report.finished_before:
        result.add_row("shards that had an index", f"{report.finished_before:,}")
    if report.shared_names:
        result.add_row("images whose names are equal up to the first dot", f"{report.shared_names:,}")
    for reason, number in report.skipped.most_common():
        result.add_row(f"files skipped: {reason}", f"{number:,}")
    return result
