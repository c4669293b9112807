"""Finds, before the first stage, what would end a curation in a later one: wrong sets, models, plug-ins, packages."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinov2.curate.collect import collect
from dinov2.curate.embed import DEFAULT_SIZE, EmbedConfig, check_model_name, open_model
from dinov2.curate.faces import open_detector
from dinov2.curate.plugins import is_function
from dinov2.curate.published import CENTERFACE, OPEN_NSFW
from dinov2.curate.screen import BUNDLED, NONE, ScreenConfig, open_scorer, with_models
from dinov2.curate.web import read_domains
from dinov2.data.shards.storage import Storage

if TYPE_CHECKING:
    from dinov2.curate.pipeline import CurateConfig

NO_SOURCE = "pages, links, images: expected one of them, got none"
PROGRAMS = (".onnx", ".pt", ".torchscript")
"""Files whose input and output nobody knows before they are run."""

BLANK = [np.zeros((64, 64, 3), np.uint8)] * 2
"""Images to try a model on: two, because the last batch may have any length."""


def check_early(config: CurateConfig, stages: Collection[str]) -> None:
    """Check what some stages need and earlier stages do not make.

    With the engine ``ray``, models run on other machines. Then files must be there, but nothing is opened or imported.

    Args:
        config: the whole curation.
        stages: names of the stages that will run.

    Raises:
        ValueError, FileNotFoundError, ImportError: something is missing or wrong. The message begins with the path of
            the very setting, or says what needs the missing package.
    """
    here = config.engine.kind != "ray"
    if stages and config.pages is config.links is config.images is None:
        raise ValueError(NO_SOURCE)
    for source, stage in (("pages", "extract"), ("links", "download"), ("images", "collect")):
        if stage in stages and (path := getattr(config, source)) is not None:
            _check_place(source, path)
    with _named("output"):
        Storage(config.output)
    for package, purpose in _packages(config, stages) if here else ():
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{purpose} needs the package {package!r}, which is not installed: pip install 'dinov2-kernels[curate]'"
            )
    if "extract" in stages and config.pages is not None:
        _check_domains("extract.blocked_domains", config.extract.blocked_domains)
        _check_domains("extract.allowed_domains", config.extract.allowed_domains)
    if "download" in stages and (config.pages is not None or config.links is not None):
        _check_domains("download.blocked_domains", config.download.blocked_domains)
    if not {"embed", "dedup"}.isdisjoint(stages):
        _check_sets("evaluation_sets", config)
    if not {"embed", "retrieve", "materialize"}.isdisjoint(stages):
        _check_sets("seeds", config)
    if "screen" in stages:
        _check_screen(config.screen, here)
    if "embed" in stages:
        check_model(config.embed_copies, "embed_copies", here)
        if config.seeds or config.retrieve.method == "hierarchical":
            check_model(config.embed, "embed", here)


def _packages(config: CurateConfig, stages: Collection[str]) -> Iterator[tuple[str, str]]:
    """Packages that some stages import, and what for."""
    yield "pyarrow", "curation"
    if "extract" in stages and config.pages is not None:
        yield "resiliparse", "reading HTML"
        yield "fastwarc", "reading WARC files"
    if "download" in stages and (config.pages is not None or config.links is not None):
        yield "aiohttp", "downloading"
        yield "protego", "reading robots.txt"
    if "screen" in stages:
        yield "cv2", "measuring quality"
        if with_models(config.screen).faces == BUNDLED:
            yield "skimage", "finding faces"
    if "retrieve" in stages and (config.seeds or config.retrieve.method == "hierarchical"):
        yield "faiss", "clustering"


def _check_domains(field: str, path: str) -> None:
    with _named(field):
        read_domains(path)


def _check_place(field: str, path: str) -> None:
    """Check that a folder or URL is there."""
    with _named(field):  # the protocol of a URL may be unknown
        storage = Storage(path)
        exists = storage.filesystem.exists(storage.root)
    if not exists:
        raise FileNotFoundError(f"{field}: expected a folder or URL that exists, got {path!r}")
    if not storage.filesystem.isdir(storage.root):
        raise ValueError(f"{field}: expected a folder or URL of a folder, got {path!r}, which is a file")


def _check_sets(field: str, config: CurateConfig) -> None:
    """Check that each set is a folder with images."""
    for path in getattr(config, field):
        _check_place(field, path)
        with _named(field), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # collecting itself will warn
            next(collect(path, config.collect, config.output), None)


def _check_screen(config: ScreenConfig, here: bool) -> None:
    chosen = with_models(config)
    _check_name("screen.faces", chosen.faces, ("auto", CENTERFACE.name, BUNDLED, NONE))
    _check_name("screen.nsfw", chosen.nsfw, ("auto", OPEN_NSFW.name, NONE, ""))
    with _named("screen.faces"):
        if chosen.faces == CENTERFACE.name:
            CENTERFACE.file()
        if here:
            open_detector(chosen.faces)
    with _named("screen.nsfw"):
        if chosen.nsfw == OPEN_NSFW.name:
            OPEN_NSFW.file()
        score = open_scorer(chosen.nsfw) if here else None
        if score is not None and chosen.nsfw.endswith(".onnx"):
            score(BLANK)


def _check_name(field: str, name: str, known: tuple[str, ...]) -> None:
    if name in known or is_function(name):
        return
    expected = f"{field}: expected {', '.join(filter(None, known))}, MODULE:FUNCTION or an ONNX file, got {name!r}"
    if not name.endswith(".onnx"):
        raise ValueError(expected)
    if not Path(name).is_file():
        raise FileNotFoundError(f"{expected}, which does not exist")


def check_model(config: EmbedConfig, at: str, here: bool) -> None:
    """Check that a model of features can be opened, and that it takes images of the size in the configuration.

    A function is imported, but not called. Weights are opened on the CPU. A program in a file is tried on blank images,
    unless it is for a GPU.

    Args:
        config: the model, and what it sees.
        at: where the configuration stands in the whole.
        here: whether the model will run on this machine.
    """
    from dinov2.train.processes import resolve_device

    check_model_name(config, at)
    if not here:
        return
    try:
        device = resolve_device(config.device)
    except ValueError as error:
        raise ValueError(f"{at}.{error}") from error
    with _named(f"{at}.model"):
        model = open_model(dataclasses.replace(config, device="cpu"), at)
        if not config.model.endswith(PROGRAMS) or device.type != "cpu":
            return
        try:
            shape = model(BLANK).shape
        except Exception as error:
            side = config.size or DEFAULT_SIZE
            raise ValueError(
                f"{at}.size: expected a size that the model takes in batches of any length, got {side}, which"
                f" {config.model} refuses: {str(error).splitlines()[-1]}"
            ) from error
        if len(shape) != 2 or shape[0] != len(BLANK):
            raise ValueError(
                f"{at}.model: expected features [b, D] for b images, got {list(shape)} for {len(BLANK)}: {config.model}"
            )


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Put the field in front of errors of any kind."""
    section = field.partition(".")[0] + "."
    try:
        yield
    except Exception as error:  # plug-ins and broken files raise errors of many types
        text = str(error).removeprefix("images: ").partition("\n")[0] or type(error).__name__
        if text.startswith(section):
            raise
        kind: Callable[[str], Exception] = ValueError
        if isinstance(error, FileNotFoundError | ImportError):
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ImportError
        elif not isinstance(error, ValueError | OSError):
            text = f"expected something that can be opened, got {type(error).__name__}: {text}"
        raise kind(f"{field}: {text}") from error
