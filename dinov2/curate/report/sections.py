"""The report page of a curation: what each stage did, read from the files of its steps."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dinov2.configuration import to_json
from dinov2.curate.faces import Box
from dinov2.curate.pipeline import CurateConfig, curate, set_names
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.report import page, sections
from dinov2.curate.report.page import Pictures, histogram
from dinov2.curate.runner import summarize
from dinov2.curate.steps import Step
from dinov2.data.files import escaped
from dinov2.data.shards.storage import Storage

REPORT = "report.html"
PER_REASON = 8
GROUPS, PER_GROUP = 12, 8
SEEDS, PER_SEED = 8, 7
HOSTS = 10


def write_report(config: CurateConfig) -> str:
    """Write ``report.html`` into the output of a curation, about all steps that are done, and return its path.

    The page loads nothing from elsewhere: pictures, charts and style are in it.
    """
    steps = list(finished_steps(config))
    storage = Storage(config.output)
    with storage.replace(f"{storage.root}/{REPORT}") as file:
        file.write(page.document(f"Curation: {escaped(config.output)}", _parts(config, steps)).encode())
    return f"{config.output}/{REPORT}"


def finished_steps(config: CurateConfig) -> Iterator[Step]:
    """The finished steps of a curation in order, without repeats, up to the first unfinished step."""
    seen = set[str]()
    for step in curate(config):
        if {task.shard for task in step.tasks} - step.finished():
            return
        if step.folder not in seen:
            seen.add(step.folder)
            yield step


def _parts(config: CurateConfig, steps: list[Step]) -> Iterator[str]:
    by_name = {step.name: step for step in steps}
    yield f"<h1>Curation</h1><p class=quiet>{escape(escaped(config.output))}</p>"
    yield from sections.funnel(steps)
    if "download-images" in by_name:
        yield from sections.downloads(by_name["download-images"])
    pool = Pool(_root(config, steps))
    if "screen-decisions" in by_name:
        yield from sections.screened(by_name["screen-decisions"], pool)
    tests = _sets(set_names(config.evaluation_sets), steps)
    if "dedup-decisions" in by_name:
        yield from sections.deduplicated(by_name["dedup-decisions"], pool, tests)
    seeds = _sets(set_names(config.seeds), steps)
    if "retrieve-decisions" in by_name:
        yield from sections.retrieved(by_name["retrieve-decisions"], pool, seeds)
    if not config.screen.nsfw:
        yield page.heading("Not done", "No scorer of unsafe images was given (screen.nsfw), so none were looked for.")
    yield page.heading("Settings") + f"<pre>{escape(json.dumps(to_json(config), indent=1))}</pre>"


def _root(config: CurateConfig, steps: list[Step]) -> str:
    """The folder of the pool's images."""
    if config.images is not None:
        return _collected(config.images, steps)
    return next((step.folder for step in steps if step.name == "download-images"), config.output)


def _sets(paths: dict[str, str], steps: list[Step]) -> dict[str, Pool]:
    return {name: Pool(_collected(path, steps)) for name, path in paths.items()}


def _collected(path: str, steps: list[Step]) -> str:
    """The folder of shards that ``path`` has, or that its files were collected into."""
    return next((step.folder for step in steps if step.name == "collect-images" and step.inputs[0] == path), path)


def funnel(steps: Sequence[Step]) -> Iterator[str]:
    """Rows in and out of every stage, reasons of dropped rows, and speed; then all steps."""
    yield page.heading("Funnel", "Rows in and out of every stage, and the reasons why rows were dropped.")
    rows = []
    for stage in summarize(steps):
        reasons = [f"{number:,} {escape(reason)}" for reason, number in stage.dropped.items()]
        rate = f"{stage.rows_in / stage.seconds:,.0f} {escape(stage.unit)}/s" if stage.seconds else ""
        share = page.share_bar(stage.rows_out / stage.rows_in if stage.rows_in else 0.0)
        rows.append([stage.name, f"{stage.rows_in:,}", f"{stage.rows_out:,}", share, "<br>".join(reasons), rate])
    yield page.table(["stage", "in", "out", "", "dropped", "speed"], rows, frozenset({1, 2, 5}))
    rows = []
    for step in steps:
        counts = step.counts()
        figures = [f"{number:,} {escape(name)}" for name, number in {**counts.dropped, **counts.figures}.items()]
        seconds = f"{step.timing().seconds:,.1f}"
        rows.append([escape(step.name), f"{counts.rows_in:,}", f"{counts.rows_out:,}", ", ".join(figures), seconds])
    every = page.table(["step", "in", "out", "figures", "seconds"], rows, frozenset({1, 2, 4}))
    yield f"<details><summary>All {len(steps)} steps</summary>{every}</details>"


def downloads(step: Step) -> Iterator[str]:
    """Failures by reason and host."""
    hosts: dict[str, Counter[str]] = defaultdict(Counter)
    for task in step.tasks:
        table = read_table(step.folder, task.shard, ["host", "reason"])
        for host, reason in zip(table["host"].to_pylist(), table["reason"].to_pylist(), strict=True):
            hosts[host][reason or ""] += 1
    yield page.heading("Downloads", f"The hosts with the most links, out of {len(hosts):,} hosts.")
    rows = [
        [
            escape(host),
            f"{counts.total():,}",
            f"{counts['']:,}",
            escape(", ".join(f"{number:,} {reason}" for reason, number in counts.most_common() if reason)),
        ]
        for host, counts in sorted(hosts.items(), key=lambda entry: (-entry[1].total(), entry[0]))[:HOSTS]
    ]
    yield page.table(["host", "links", "images", "failures"], rows, frozenset({1, 2}))


def screened(step: Step, pool: Pool) -> Iterator[str]:
    """Dropped images by reason, faces before and after, and distributions of the measures."""
    pictures, by_reason, faces = Pictures(pool), defaultdict[str, list[str]](list), list[str]()
    values: dict[str, list[Any]] = defaultdict(list)
    for task in step.tasks:
        table, index = read_table(step.folder, task.shard), pool.index(task.shard, ["width", "height"])
        for name in ("entropy", "sharpness"):
            values[name].append(table[name].drop_null().to_numpy())
        width, height = index["width"].to_numpy(), index["height"].to_numpy()
        values["shorter side"].append(np.minimum(width, height))
        values["aspect"].append(np.maximum(width, height) / np.maximum(np.minimum(width, height), 1))
        for row, reason in enumerate(table["reason"].to_pylist()):
            if reason is not None and len(by_reason[reason]) < PER_REASON:
                by_reason[reason].append(
                    page.figure(pictures.at(task.shard, row), f"{width[row]} x {height[row]}", "gone")
                )
        for row, boxes in enumerate(table["faces"].to_pylist()):
            if boxes and table["keep"][row].as_py() and len(faces) < PER_REASON:
                found = [Box(**box) for box in boxes]
                faces.append(page.figure(pictures.at(task.shard, row), "before"))
                faces.append(page.figure(pictures.at(task.shard, row, found), f"{len(found)} blurred", "kept"))
    yield page.heading("Screening", "Images that were dropped because they are unfit or repeat another image.")
    for reason, figures in sorted(by_reason.items()):
        yield page.subheading(f"{reason}: {step.counts().dropped[reason]:,}") + page.row(figures)
    if faces:
        yield page.subheading("Faces, blurred in the final set") + page.row(faces)
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    yield (
        '<div class="charts">'
        + "".join(
            [
                histogram("shorter side, pixels", joined["shorter side"], logarithmic=True),
                histogram("aspect", joined["aspect"]),
                histogram("entropy of grey levels, bits", joined["entropy"]),
                histogram(
                    "sharpness, on images that have any", joined["sharpness"][joined["sharpness"] > 0], logarithmic=True
                ),
            ]
        )
        + "</div>"
    )


def deduplicated(step: Step, pool: Pool, references: Mapping[str, Pool]) -> Iterator[str]:
    """Groups of copies with the kept image first, and images that were dropped as near an evaluation image."""
    pictures = Pictures(pool)
    of_sets = {name: Pictures(reference) for name, reference in references.items()}
    groups: dict[tuple[str, int], list[tuple[float, str, int]]] = defaultdict(list)
    near: list[list[str]] = []
    cosines, components = [np.zeros(0)], Counter[int]()
    for task in step.tasks:
        table = read_table(step.folder, task.shard).to_pydict()
        components.update(number for number in table["component"] if number is not None)
        for row, reason in enumerate(table["reason"]):
            if reason == "duplicate":
                cosine = table["representative_cosine"][row]
                place = table["representative_shard"][row], table["representative_row"][row]
                groups[place].append((cosine, task.shard, row))
                cosines.append(np.array([cosine]))
            elif reason is not None and table["reference"][row] is not None and len(near) < GROUPS:
                name, cosine = table["reference"][row], table["reference_cosine"][row]
                there = of_sets[name].at(table["reference_shard"][row], table["reference_row"][row])
                near.append(
                    [
                        page.figure(there, f"of {name}"),
                        page.figure(pictures.at(task.shard, row), f"dropped, cosine {cosine:.2f}", "gone"),
                    ]
                )
    yield page.heading("Copies", "Groups of near-copies: the kept image has a green frame, the dropped ones a red one.")
    largest = sorted(groups.items(), key=lambda entry: (-len(entry[1]), entry[0]))
    typical = largest[GROUPS // 2 :][:: max(len(largest) // GROUPS, 1)]
    rows = []
    for place, members in [*largest[: GROUPS // 2], *typical[:GROUPS]]:
        shown = sorted(members, key=lambda member: (-member[0], *member[1:]))[:PER_GROUP]
        copies = [page.figure(pictures.at(shard, row), f"cosine {cosine:.2f}", "gone") for cosine, shard, row in shown]
        rows.append(page.row([page.figure(pictures.at(*place), "kept", "kept"), *copies]))
    yield page.groups(rows)
    if near:
        yield page.subheading("Dropped because an image of their component is near an evaluation image")
        yield page.groups(page.row(pair) for pair in near)
    sizes = np.array(sorted(components.values()))
    yield (
        '<div class="charts">'
        + histogram("cosine to the image kept", np.concatenate(cosines))
        + histogram("images of a component of two or more", sizes[sizes > 1], logarithmic=True)
        + "</div>"
    )


def retrieved(step: Step, pool: Pool, seeds: Mapping[str, Pool]) -> Iterator[str]:
    """Seeds with the images retrieved for them, samples of clusters, and how often images were asked for."""
    pictures, of_sets = Pictures(pool), {name: Pictures(own) for name, own in seeds.items()}
    by_seed: dict[tuple[str, int], list[tuple[float, str, int]]] = defaultdict(list)
    by_cluster: dict[int, list[tuple[str, int]]] = defaultdict(list)
    times, clusters = [np.zeros(0, np.int64)], Counter[int]()
    for task in step.tasks:
        table = read_table(step.folder, task.shard).to_pydict()
        times.append(np.array(table["times"]))
        clusters.update(number for number in table["cluster"] if number is not None and number >= 0)
        for row, kept in enumerate(table["keep"]):
            if kept and table["seed"][row] is not None:
                place = table["seed_set"][row], table["seed"][row]
                by_seed[place].append((table["cosine"][row], task.shard, row))
            elif kept and table["cluster"][row] is not None:
                by_cluster[table["cluster"][row]].append((task.shard, row))
    yield page.heading(
        "Retrieval", "Curated images with the images retrieved for them, and clusters with the images drawn from them."
    )
    for (name, seed), found in sorted(by_seed.items(), key=lambda entry: (-len(entry[1]), entry[0]))[:SEEDS]:
        shown = sorted(found, key=lambda member: (-member[0], *member[1:]))[:PER_SEED]
        yield page.row(
            [page.figure(of_sets[name].at_position(seed), f"seed of {name}")]
            + [page.figure(pictures.at(shard, row), f"cosine {cosine:.2f}", "kept") for cosine, shard, row in shown]
        )
    for cluster, members in sorted(by_cluster.items(), key=lambda entry: (-len(entry[1]), entry[0]))[:SEEDS]:
        title = f"cluster {cluster}: {len(members):,} of {clusters[cluster]:,} images"
        yield page.subheading(title) + page.row(
            page.figure(pictures.at(*place), "", "kept") for place in members[:PER_GROUP]
        )
    asked = np.concatenate(times)
    yield (
        '<div class="charts">'
        + histogram("times an image was asked for", asked[asked > 0])
        + histogram("images of a cluster", np.array(sorted(clusters.values())), logarithmic=True)
        + "</div>"
    )
