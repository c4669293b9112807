"""Folders of a curation that lie in one another, so that images play two parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from dinov2.data.files import quoted
from dinov2.data.shards.storage import Storage, is_local


class OverlapWarning(UserWarning):
    """The folders of a curation share images."""


def check_overlaps(
    images: str | None, evaluation_sets: Sequence[str], seeds: Sequence[str], as_is: Sequence[str]
) -> None:
    """Say which of the images, seeds and evaluation sets lie in one another.

    Args:
        images: folder or URL of the images, if the curation begins with images.
        evaluation_sets: folders or URLs.
        seeds: folders or URLs.
        as_is: last names of the seeds that join the final set; ``*`` stands for all.

    Raises:
        ValueError: all images are evaluation images, or evaluation images would join the final set.

    Warns:
        OverlapWarning: some images play two parts.
    """
    for tests in evaluation_sets if images is not None else ():
        if _is_within(str(images), tests):
            raise ValueError(
                f"evaluation_sets: expected a folder that does not hold the images, {quoted(str(images))}, got"
                f" {quoted(tests)}: every image would be an evaluation image"
            )
        if _is_within(tests, str(images)):
            _warn(
                f"evaluation_sets: {quoted(tests)} lies in the folder of the images: its images are in the pool, too,"
                " and are dropped there like all that look like them"
            )
    for path in seeds if images is not None else ():
        if _overlap(path, str(images)):
            _warn(
                f"seeds: {quoted(path)} shares images with {quoted(str(images))}, the images: the pool holds seeds"
                " themselves, and these are retrieved first"
            )
    for path in seeds:
        for tests in evaluation_sets:
            if not _overlap(path, tests):
                continue
            name = os.path.basename(path.rstrip("/"))
            if not {"*", name}.isdisjoint(as_is):
                raise ValueError(
                    f"materialize.as_is: expected seeds without evaluation images, got {quoted(name)}, which shares"
                    f" images with the evaluation set {quoted(tests)}"
                )
            _warn(f"seeds: {quoted(path)} shares images with the evaluation set {quoted(tests)}")


def _overlap(first: str, second: str) -> bool:
    return _is_within(first, second) or _is_within(second, first)


def _is_within(inner: str, outer: str) -> bool:
    """Whether a folder or URL is another one, or lies in it."""
    return f"{place_of(inner)}/".startswith(f"{place_of(outer)}/")


def place_of(path: str) -> str:
    """One spelling of a folder or URL, without a slash at the end."""
    storage = Storage(path)
    if is_local(storage.filesystem):
        return str(os.path.realpath(storage.root)).rstrip("/")
    return str(storage.filesystem.unstrip_protocol(storage.root)).rstrip("/")


def _warn(text: str) -> None:
    warnings.warn(text, OverlapWarning, stacklevel=3)
