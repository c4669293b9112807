"""Puts the page together from what the steps of a curation have left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape

from dinov2.curate.config import CurateConfig, set_names
from dinov2.curate.pipeline import curate
from dinov2.curate.pool import Pool
from dinov2.curate.report import page, sections
from dinov2.curate.steps import Step, plain
from dinov2.data.shards.storage import Storage

REPORT = "report.html"


def write_report(config: CurateConfig) -> str:
    """Write ``report.html`` into the output of a curation, about all steps that are done; returns where it is.

    The page needs nothing from elsewhere: pictures, charts and style are in it.
    """
    steps = list(finished_steps(config))
    storage = Storage(config.output)
    with storage.replace(f"{storage.root}/{REPORT}") as file:
        file.write(page.document(f"Curation: {config.output}", _parts(config, steps)).encode())
    return f"{config.output}/{REPORT}"


def finished_steps(config: CurateConfig) -> Iterator[Step]:
    """The steps of a curation that are done, in order, each once, up to the first that is not."""
    seen = set[str]()
    for step in curate(config):
        if {task.shard for task in step.tasks} - step.finished():
            return
        if step.folder not in seen:
            seen.add(step.folder)
            yield step


def _parts(config: CurateConfig, steps: list[Step]) -> Iterator[str]:
    by_name = {step.name: step for step in steps}
    yield f"<h1>Curation</h1><p class=quiet>{escape(config.output)}</p>"
    yield sections.funnel(steps)
    if "download-images" in by_name:
        yield from sections.downloads(by_name["download-images"])
    pool = Pool(_root(config, steps))
    if "screen-decisions" in by_name:
        yield from sections.screened(by_name["screen-decisions"], pool)
    tests = _sets(set_names(config.evaluation_sets, "evaluation_sets"), steps)
    if "dedup-decisions" in by_name:
        yield from sections.deduplicated(by_name["dedup-decisions"], pool, tests)
    seeds = _sets(set_names(config.seeds, "seeds"), steps)
    if "retrieve-decisions" in by_name:
        yield from sections.retrieved(by_name["retrieve-decisions"], pool, seeds)
    if not config.screen.nsfw:
        yield page.heading("Not done", "No scorer of unsafe images was given (screen.nsfw): none was looked for.")
    yield page.heading("Settings") + f"<pre>{escape(json.dumps(plain(config), indent=1))}</pre>"


def _root(config: CurateConfig, steps: list[Step]) -> str:
    """Where the pool's images are."""
    if config.images is not None:
        return _collected(config.images, steps)
    return next((step.folder for step in steps if step.name == "download-images"), config.output)


def _sets(paths: dict[str, str], steps: list[Step]) -> dict[str, Pool]:
    return {name: Pool(_collected(path, steps)) for name, path in paths.items()}


def _collected(path: str, steps: list[Step]) -> str:
    """Shards as they are, or those that a folder's files went into."""
    return next((step.folder for step in steps if step.name == "collect-images" and step.inputs == (path,)), path)
