"""The stage: a plan of which image goes where, then one task for each shard of the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from dinov2.curate.clusters.choose import random_keys
from dinov2.curate.materialize.config import MaterializeConfig
from dinov2.curate.materialize.source import Source, read_images
from dinov2.curate.pool import Pool, read_array
from dinov2.curate.screen.faces import blurred_file
from dinov2.curate.search.layout import layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Step, Steps, Task
from dinov2.data.shards import ShardImage, write_shard

OUT = "cannot be read"


def materialize(pool: Pool, seeds: Mapping[str, Pool], config: MaterializeConfig, output: str) -> Steps[str]:
    """Write the images that are still in, and whole sets of seeds, into shards in random order.

    Bytes stay as they were downloaded but for images with faces, which are blurred. The index has, beside what every
    index has, the columns ``source`` (set and shard an image is from), those that it had there, and what the stages
    found out: component, cluster, times, seed_set.

    Args:
        pool: images.
        seeds: sets that ``config.as_is`` may name.
        config: how.
        output: folder or URL of the whole curation.

    Returns:
        Where the shards are, the ``--data.root`` of pretraining.

    Raises:
        ValueError: there is no such set, or no image is left.
    """
    names = sorted(seeds) if "*" in config.as_is else list(config.as_is)
    if unknown := set(names) - set(seeds):
        raise ValueError(f"materialize.as_is must name sets of seeds, {sorted(seeds)}, but names {sorted(unknown)}")
    pools = {"": pool} | {name: seeds[name] for name in sorted(names)}
    layouts = {}
    for name, source in pools.items():
        layouts[name] = yield from layout_of(source, "materialize", output)
    sources = tuple((name, source, layouts[name]) for name, source in pools.items())
    inputs = tuple(folder for _, source, layout in sources for folder in (source.images, *source.decisions, layout))
    settings = [config.seed, [name for name, _, _ in sources]]
    plan = Step(output, "materialize-plan", settings, inputs, [Task("all", _plan, (sources, config.seed))])
    yield plan
    images = plan.counts().rows_out
    if not images:
        raise ValueError(f"no image is left to be written: see what the stages dropped under {output}")
    tasks = [
        Task(f"{number:05d}", _write, (sources, plan.folder, start, min(start + config.shard_size, images), config))
        for number, start in enumerate(range(0, images, config.shard_size))
    ]
    final = Step(output, "materialize-set", [config.shard_size, config.blur_faces], (plan.folder, *inputs), tasks)
    yield final
    return final.folder


def _plan(output: Output, sources: tuple[Source, ...], seed: int) -> Counts:
    """Task: write ``all.npy``, [N, 2] int64: number of the source and position in it of each image, in final order."""
    parts, rows = [np.zeros((0, 2), np.int64)], 0
    for number, (_, pool, folder) in enumerate(sources):
        layout = read_layout(folder)
        rows += layout.rows
        for shard in layout.names:
            kept = layout.range_of(shard)[0] + np.flatnonzero(pool.kept(shard))
            parts.append(np.stack([np.full(len(kept), number), kept], axis=1))
    entries = np.concatenate(parts)
    keys = random_keys(entries[:, 1] + (entries[:, 0] << 48), seed, "materialize")
    output.write_array(entries[np.argsort(keys, kind="stable")])
    return Counts(rows, len(entries))


def _write(
    output: Output, sources: tuple[Source, ...], plan: str, start: int, stop: int, config: MaterializeConfig
) -> Counts:
    """Task: one shard."""
    entries = np.array(read_array(plan, "all")[start:stop])
    dropped, blurred = Counter[str](), 0

    def images() -> Iterator[ShardImage]:
        nonlocal blurred
        for place, (content, columns, faces) in enumerate(read_images(sources, entries), start):
            if faces and config.blur_faces:
                try:
                    content = blurred_file(content, faces)
                except (OSError, ValueError):
                    dropped[OUT] += 1  # rather than with its faces
                    continue
                blurred += 1
            yield ShardImage(f"{place:09d}", content, columns)

    report = write_shard(images(), output.folder, int(output.shard))
    return Counts(len(entries), report.images, dict(sorted((dropped + report.skipped).items())), {"blurred": blurred})
