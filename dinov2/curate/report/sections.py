"""The report page of a curation: what each stage did, read from the files of its steps."""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dinov2.configuration import to_json
from dinov2.curate.faces import Box
from dinov2.curate.overlaps import OverlapWarning
from dinov2.curate.pipeline import STAGES, CurateConfig
from dinov2.curate.pool import Pool, read_table
from dinov2.curate.report import page, sections
from dinov2.curate.report.fates import Cause, Fates, names_of, write_fates
from dinov2.curate.report.finished import finished_steps, pool_of, sets_of
from dinov2.curate.report.page import Pictures, histogram
from dinov2.curate.runner import summarize
from dinov2.curate.screen import with_models
from dinov2.curate.steps import Step
from dinov2.data.files import BrokenLinkWarning, escaped, shown
from dinov2.data.folders import SourceWarning
from dinov2.data.outputs import DROPPED, FATES, REPORT
from dinov2.data.remarks import kept_remarks
from dinov2.data.shards.storage import Storage

PER_REASON = 8
GROUPS, PER_GROUP = 12, 8
SEEDS, PER_SEED = 8, 7
HOSTS = 10
MEASURES = ("entropy", "sharpness", "shorter side", "aspect")


def write_report(config: CurateConfig) -> str:
    """Write ``report.html`` into the output of a curation, about all steps that are done, and return its path.

    The page loads nothing from elsewhere: pictures, charts and style are in it. Beside it, :func:`write_fates` writes
    the table of all images.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SourceWarning)  # the run has said it
        warnings.simplefilter("ignore", OverlapWarning)
        warnings.simplefilter("ignore", BrokenLinkWarning)
        steps = list(finished_steps(config))
    storage = Storage(config.output)
    with kept_remarks():  # the table has them
        fates = write_fates(config, steps)
        with storage.replace(f"{storage.root}/{REPORT}") as file:
            file.write(page.document(f"Curation: {escaped(config.output)}", _parts(config, steps, fates)).encode())
    return f"{config.output}/{REPORT}"


def _parts(config: CurateConfig, steps: list[Step], fates: Fates) -> Iterator[str]:
    by_name = {step.name: step for step in steps}
    yield f"<h1>Curation</h1><p class=quiet>{escape(escaped(config.output))}</p>"
    yield from sections.funnel(steps)
    tests, seeds = (sets_of(config, field, steps) for field in ("evaluation_sets", "seeds"))
    yield from sections.names(
        [f"evaluation_sets/{name}" for name in tests] + [f"seeds/{name}" for name in seeds], fates
    )
    if "download-images" in by_name:
        yield from sections.downloads(by_name["download-images"])
    pool = pool_of(config, steps)
    if "screen-decisions" in by_name:
        yield from sections.screened(by_name["screen-decisions"], pool)
    if "dedup-decisions" in by_name:
        yield from sections.deduplicated(by_name["dedup-decisions"], pool, tests)
    if "retrieve-decisions" in by_name:
        yield from sections.retrieved(by_name["retrieve-decisions"], pool, seeds)
    if not with_models(config.screen).nsfw:
        yield page.heading("Not done", "No scorer of unsafe images was given (screen.nsfw), so none were looked for.")
    yield page.heading("Settings") + f"<pre>{escape(json.dumps(to_json(config), indent=1))}</pre>"


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
    for step in steps:
        if step.note:
            yield f"<p>{escape(step.name)}: {escape(step.note)}</p>"
    rows = []
    for step in steps:
        counts = step.counts()
        figures = [f"{number:,} {escape(name)}" for name, number in {**counts.dropped, **counts.figures}.items()]
        seconds = f"{step.timing().seconds:,.1f}"
        rows.append([escape(step.name), f"{counts.rows_in:,}", f"{counts.rows_out:,}", ", ".join(figures), seconds])
    every = page.table(["step", "in", "out", "figures", "seconds"], rows, frozenset({1, 2, 4}))
    yield f"<details><summary>All {len(steps)} steps</summary>{every}</details>"


def names(sets: Sequence[str], fates: Fates) -> Iterator[str]:
    """Names of dropped images by reason, and of images that were kept although a library complained."""
    yield page.heading(
        "Names and reasons",
        f"Some of the images that were dropped. The folder of this page has the name and the fate of every image in"
        f" {FATES}, and those of all dropped images in {DROPPED}.",
    )
    for name in sets:
        if not fates.kept[name]:
            yield f"<p>{escape(name)} has no image that can be used.</p>"
    rows = [
        [
            escape(cause.set),
            escape(cause.stage),
            escape(cause.reason),
            f"{number:,}",
            _examples(fates.examples[cause]),
        ]
        for cause, number in sorted(fates.dropped.items(), key=lambda entry: _order(entry[0], sets))
    ]
    if fates.remarks:
        rows.append(["", "", "in use, with a remark", f"{fates.remarked:,}", _examples(fates.remarks)])
    if rows:
        yield page.table(["set", "stage", "reason", "images", "for example"], rows, frozenset({3}))


def _order(cause: Cause, sets: Sequence[str]) -> tuple[int, int, str]:
    return sets.index(cause.set) if cause.set in sets else -1, STAGES.index(cause.stage), cause.reason


def _examples(named: Sequence[tuple[str, str]]) -> str:
    lines = [
        escape(shown(name)) + (f' <span class="quiet">{escape(remark)}</span>' if remark else "")
        for name, remark in named
    ]
    return f'<div class="names">{"<br>".join(lines)}</div>'


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
        table, index = read_table(step.folder, task.shard), pool.index(task.shard)
        for name in MEASURES[:2]:
            values[name].append(table[name].drop_null().to_numpy())
        width, height = index["width"].to_numpy(), index["height"].to_numpy()
        values["shorter side"].append(np.minimum(width, height))
        values["aspect"].append(np.maximum(width, height) / np.maximum(np.minimum(width, height), 1))
        for row, reason in enumerate(table["reason"].to_pylist()):
            if reason is not None and len(by_reason[reason]) < PER_REASON:
                (name,) = names_of(index.slice(row, 1), task.shard)
                caption = f"{shown(name)}, {width[row]} x {height[row]}"
                by_reason[reason].append(page.figure(pictures.at(task.shard, row), caption, "gone"))
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
    joined = {name: np.concatenate([np.zeros(0), *values[name]]) for name in MEASURES}
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
        some = sorted(members, key=lambda member: (-member[0], *member[1:]))[:PER_GROUP]
        copies = [page.figure(pictures.at(shard, row), f"cosine {cosine:.2f}", "gone") for cosine, shard, row in some]
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
        some = sorted(found, key=lambda member: (-member[0], *member[1:]))[:PER_SEED]
        yield page.row(
            [page.figure(of_sets[name].at_position(seed), f"seed of {name}")]
            + [page.figure(pictures.at(shard, row), f"cosine {cosine:.2f}", "kept") for cosine, shard, row in some]
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
