"""The embed stage: a feature for every image, from your model or from a built-in one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dinov2.configuration import Config, Count, CountOr0, Rules
from dinov2.curate.copies.points import CONTRAST, POINTS, SIDE, Sketch
from dinov2.curate.copies.sketches import open_sketches, sketched
from dinov2.curate.pieces import Piece, by_pieces
from dinov2.curate.plugins import identity_of, is_function, load_function, open_onnx
from dinov2.curate.pool import Pool, write_decisions
from dinov2.curate.repeats import originals
from dinov2.curate.search.vectors import layout_of, read_layout
from dinov2.curate.steps import Counts, Output, Steps
from dinov2.curate.views import (
    BATCH_PIXELS,
    FUNCTION_SIDE,
    SMALL_SIDE,
    small_images,
)
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels, UnreadableImageError
from dinov2.data.decoding_reduced import decode_reduced
from dinov2.data.remarks import kept_remarks
from dinov2.evaluate.handmade import colour_histogram, texture_histogram
from dinov2.extras import require

if TYPE_CHECKING:
    from torch import Tensor

UNREADABLE, FEATURELESS = "unreadable", "without features"
Features = npt.NDArray[np.float32]
Model = Callable[[list[Pixels]], Features]
"""Takes b uint8 RGB images [H, W, 3] of any sizes and returns their features [b, D], of any norm."""

DEFAULT_SIZE = 224


@dataclass(frozen=True)
class EmbedConfig(Config, at="embed"):
    """Which features images get, and what the model sees of an image."""

    model: str = "copies"
    """This model computes the features. copies and colour-texture are built in. Otherwise name weights of any kind that
    load_pretrained reads; an ONNX (.onnx) or TorchScript (.pt, .torchscript) file that maps [b, 3, size, size] to
    [b, D]; or MODULE:FUNCTION, which is called with a list of uint8 RGB images [H, W, 3] of at most 1024 pixels a side
    and returns [b, D]."""
    size: CountOr0 = 0
    """The model sees squares with sides of this many pixels. 0 takes the model's own size, or 224 if it has none."""
    view: Literal["centre", "squash"] = "centre"
    """centre shows the middle, after the shorter side was resized to 8/7 of the size. squash shows the whole image and
    changes its aspect, as copy detection wants it."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """This is subtracted from each channel, on a scale from 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Each channel is divided by this after the subtraction."""
    batch_size: Count = 32
    """A forward pass takes this many images; at most 64 if the pool has few shards."""
    device: str = "auto"
    """The model runs here: cpu, cuda, ...; auto takes a GPU if there is one."""

    def rules(self) -> Rules:
        """Images are RGB."""
        for name in ("mean", "std"):
            yield name, len(getattr(self, name)) == 3, "3 values"


def embed(pool: Pool, config: EmbedConfig, output: str, at: str = "embed") -> Steps[Pool]:
    """Write the features of a pool's images: float16 [n, D] a shard, of unit length, NaN in rows without a feature.

    Args:
        pool: images to embed.
        config: the model, and what it sees.
        output: folder or URL of the whole curation.
        at: where the configuration stands in the whole, for errors.

    Returns:
        The pool with its features, without the images that have none.

    Raises:
        ValueError, FileNotFoundError: the model does not exist.
    """
    check_model_name(config, at)
    name = config.model
    settings = dataclasses.replace(config, device="auto", model=name if name in BUILT_IN else identity_of(name))
    places = read_layout((yield from layout_of(pool, "embed", output)))
    seen: list[Any] = [settings, FUNCTION_SIDE, SMALL_SIDE]
    if name == COPIES:
        pool = yield from sketched(pool, places, output, "embed")
        seen += [SIDE, POINTS, CONTRAST]
    arguments = (config, settings.model, at)
    features = yield from by_pieces(output, "embed-features", seen, pool, places, _embed, arguments, gpu=True)
    return dataclasses.replace(pool.after(features.folder), features=features.folder)


def check_model_name(config: EmbedConfig, at: str) -> None:
    """Raise a FileNotFoundError if no model has the name in a configuration, which stands ``at`` a place in the
    whole."""
    name = config.model
    if not (name in BUILT_IN or is_function(name) or Path(name).exists()):
        raise FileNotFoundError(f"{at}.model: expected {', '.join(BUILT_IN)}, MODULE:FUNCTION or a file, got {name!r}")


@functools.lru_cache(maxsize=1)
def _opened(config: EmbedConfig, identity: str, at: str) -> Opened:
    """The model of a configuration, opened once in a process for all its tasks; ``identity`` is that of its file."""
    return open_model(config, at)


def _embed(output: Output, pool: Pool, piece: Piece, config: EmbedConfig, identity: str, at: str) -> Counts:
    """Task: write the features of a piece of a shard. Files with the same bytes are embedded once."""
    model = _opened(config, identity, at)
    before = pool.kept(piece.shard)[piece.start : piece.stop]
    kept = piece.start + np.flatnonzero(before)
    first = originals(pool, piece.shard, kept)
    reasons: list[str | None] = [None] * piece.rows
    remarks: list[str | None] = [None] * piece.rows
    features: npt.NDArray[np.float16] | None = None
    sketches = open_sketches(pool) if config.model == COPIES else None
    for rows, images in _batches(pool, piece, kept[first == kept], reasons, remarks, model, config.batch_size):
        if sketches is None:
            found = unit(model(images))
        else:
            found = unit(copies(images, [sketches(piece.shard, piece.start + row) for row in rows]))
        if features is None:
            features = np.full((piece.rows, found.shape[1]), np.nan, np.float16)
        features[rows] = found
        output.advance(len(rows))
    if features is None:
        features = np.full((piece.rows, _width(model)), np.nan, np.float16)
    for row, original in zip((kept - piece.start).tolist(), (first - piece.start).tolist(), strict=True):
        features[row], reasons[row], remarks[row] = features[original], reasons[original], remarks[original]
    for row in np.flatnonzero(before & ~np.isfinite(features).all(axis=1)).tolist():
        reasons[row] = reasons[row] or FEATURELESS
    output.write_array(features)
    arrow = require("pyarrow", extra="curate", purpose="curation")
    return write_decisions(output, reasons, before, {"remark": arrow.array(remarks, arrow.string())})


def unit(features: Features) -> npt.NDArray[np.float16]:
    """Scale rows [n, D] to unit length, then round them. Rows without a direction become NaN."""
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled: npt.NDArray[np.float16] = np.where(lengths > 0, features / lengths, np.nan).astype(np.float16)
    return scaled


def _batches(
    pool: Pool,
    piece: Piece,
    rows: npt.NDArray[np.int64],
    reasons: list[str | None],
    remarks: list[str | None],
    model: Opened,
    size: int,
) -> Iterator[tuple[list[int], list[Pixels]]]:
    """Batches of rows of a piece and their images; unreadable rows get their reason. The decoder's words become
    remarks."""
    batch: list[int] = []
    images: list[Pixels] = []
    read = model.reader(pool, piece)
    for row in rows.tolist():
        place = row - piece.start
        with kept_remarks() as said:
            try:
                images.append(read(row))
            except UnreadableImageError as error:
                reasons[place], remarks[place] = UNREADABLE, error.words
                continue
        remarks[place] = "; ".join(said) or None
        batch.append(place)
        if len(batch) == size or sum(image.size for image in images) >= 3 * BATCH_PIXELS:
            yield batch, images
            batch, images = [], []
    if batch:
        yield batch, images


def _width(model: Opened) -> int:
    """The dimension of a feature, measured on a blank image."""
    width: int = model([np.zeros((64, 64, 3), np.uint8)]).shape[1]
    return width


@dataclass(frozen=True)
class Opened:
    """A model that can be called, and the size at which it wants its images.

    Attributes:
        model: the model.
        side: images have at most this many pixels on the longer side, unless ``least`` asks for more.
        least: images have at least this many pixels on the shorter side, if the file has them.
        is_small: whether the model sees small images, of :func:`~dinov2.curate.views.small_images`.
    """

    model: Model
    side: int
    least: int = 0
    is_small: bool = False

    def __call__(self, images: list[Pixels]) -> Features:
        """The features of images."""
        return self.model(images)

    def reader(self, pool: Pool, piece: Piece) -> Callable[[int], Pixels]:
        """A function that returns an image for the model by its row. It raises an UnreadableImageError if the image
        cannot be decoded."""
        if self.is_small:
            return small_images(pool, piece.shard, piece.start, piece.name)
        files = pool.open_images(piece.shard)
        return lambda row: decode_reduced(files[row], f"{row} of {piece.shard}", self.side, self.least).pixels


def open_model(config: EmbedConfig, at: str = "embed") -> Opened:
    """The model that a configuration names; ``at`` is where the configuration stands in the whole, for errors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no model, or the model takes images of another size.
        ImportError: a package is missing; the message names the extra.
    """
    if config.model in BUILT_IN:
        return Opened(BUILT_IN[config.model], SMALL_SIDE, is_small=True)
    import torch

    from dinov2.models import load_pretrained
    from dinov2.train.processes import resolve_device

    kind = Path(config.model).suffix
    if kind == ".onnx":
        run = open_onnx(config.model)
        return _seen(lambda views: torch.from_numpy(run(views.numpy())), config, DEFAULT_SIZE)
    if kind in (".pt", ".torchscript") and _is_torchscript(config.model):
        return _seen(_open_torchscript(config.model, config.device), config, DEFAULT_SIZE)
    if is_function(config.model):
        return Opened(load_function(config.model), FUNCTION_SIDE)
    device = resolve_device(config.device)
    network = load_pretrained(config.model).eval().to(device)
    size = config.size or network.config.img_size
    if size % network.config.patch_size:
        raise ValueError(
            f"{at}.size: expected a multiple of {network.config.patch_size}, the model's patch, got {size}"
        )
    return _seen(lambda views: network(views.to(device)).float().cpu(), config, size)


def copies(images: list[Pixels], sketches: list[Sketch | None] | None = None) -> Features:
    """Features that copies of an image share (:mod:`dinov2.curate.copies.features`): [b, 512]."""
    from dinov2.curate.copies.features import describe_copies

    return describe_copies(images, sketches)


def colour_texture(images: list[Pixels]) -> Features:
    """Square roots of histograms of each image's colours and textures (Hellinger distance): [b, 86]."""
    rows = [
        np.concatenate([colour_histogram(image[None]), 2 * texture_histogram(image[None])], axis=1) for image in images
    ]
    features: Features = np.sqrt(np.concatenate(rows))
    return features


COPIES = "copies"
BUILT_IN: dict[str, Model] = {COPIES: copies, "colour-texture": colour_texture}


def _seen(network: Callable[[Tensor], Tensor], config: EmbedConfig, size: int) -> Opened:
    """Make a model of images from a network that takes batches. Images are reduced to twice the size of its views, so
    that resizing them in two steps does not blur them."""
    import torch

    size = config.size or size
    seen = math.ceil(size * 8 / 7) if config.view == "centre" else size

    @torch.inference_mode()
    def features(images: list[Pixels]) -> Features:
        views = [_view(image, config, size) for image in images]
        result: Features = network(torch.stack(views)).numpy()  # [b, D]
        return result

    return Opened(features, 2 * seen, 2 * seen)


def _view(image: Pixels, config: EmbedConfig, size: int) -> Tensor:
    """The part of an image that a network sees, float32 [3, size, size]."""
    import torch

    from dinov2.data import normalize
    from dinov2.evaluate.probe import central_crop

    seen = central_crop(image, size) if config.view == "centre" else resized(image, size, size)
    return torch.from_numpy(normalize(seen, config.mean, config.std))


def _is_torchscript(path: str) -> bool:
    """Whether a file is TorchScript: a zip archive with code in it. Files of weights have no code."""
    import torch

    try:
        return any(
            name.startswith("code/") or "/code/" in name for name in torch._C.PyTorchFileReader(path).get_all_records()
        )
    except RuntimeError:
        return False


def _open_torchscript(path: str, device_name: str) -> Callable[[Tensor], Tensor]:
    import torch

    from dinov2.train.processes import resolve_device

    device = resolve_device(device_name)
    network = torch.jit.load(path, map_location=device).eval()
    return lambda views: network(views.to(device)).float().cpu()
