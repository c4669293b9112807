"""The finished steps of a curation, and the folders of its images and decisions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from dinov2.curate.materialize import NothingLeftError
from dinov2.curate.pipeline import CurateConfig, EmptySetWarning, curate, set_names
from dinov2.curate.pool import Pool
from dinov2.curate.steps import Step
from dinov2.data import BrokenLinkWarning
from dinov2.data.outputs import final_set


def finished_steps(config: CurateConfig) -> Iterator[Step]:
    """The finished steps of a curation in order, without repeats, up to the first unfinished step."""
    seen, steps = set[str](), curate(config, check=())
    while True:
        try:
            with warnings.catch_warnings():
                for known in (EmptySetWarning, BrokenLinkWarning):  # of which the run has warned already
                    warnings.simplefilter("ignore", known)
                step = next(steps)
        except (StopIteration, NothingLeftError):
            return
        if {task.shard for task in step.tasks} - step.finished():
            return
        if step.folder not in seen:
            seen.add(step.folder)
            yield step


def pool_of(config: CurateConfig, steps: Sequence[Step]) -> Pool:
    """The pool after all finished decisions."""
    if config.images is not None:
        root = folder_of(config.images, steps)
    else:
        root = next((step.folder for step in steps if step.name == "download-images"), config.output)
    embedded = [step.folder for step, images, is_curated in _embedding(steps) if images == root and is_curated]
    decisions = [step.folder for step in steps if step.name.endswith("-decisions") or step.folder in embedded]
    return Pool(root, tuple(decisions))


def sets_of(config: CurateConfig, field: str, steps: Sequence[Step]) -> dict[str, Pool]:
    """The pools of ``evaluation_sets`` or ``seeds`` by name, without their images that could not be embedded."""
    pools = {}
    for name, path in set_names(getattr(config, field)).items():
        root = folder_of(path, steps)
        embedded = [step.folder for step, images, is_curated in _embedding(steps) if images == root and not is_curated]
        of_field = embedded[:1] if field == "evaluation_sets" else embedded[-1:]  # a set may be both
        pools[name] = Pool(root, tuple(of_field))
    return pools


def folder_of(path: str, steps: Sequence[Step]) -> str:
    """The folder of shards that ``path`` has, or that its files were collected into."""
    collected = (step.folder for step in steps if step.name == "collect-images" and step.inputs[0] == path)
    return next(collected, final_set(path) or path)


def _embedding(steps: Sequence[Step]) -> Iterator[tuple[Step, str, bool]]:
    """The steps that wrote features, with the folder of the images that they read, and whether these are of the pool
    that is curated: it has decisions, and other sets have none yet. Features may be joined from those of pieces."""
    inputs = {step.folder: step.inputs for step in steps}
    for step in steps:
        if step.name == "embed-features":
            images, *others = inputs.get(step.inputs[0], step.inputs)
            yield step, images, any("/" in other for other in others)  # the digest of tars is no folder
