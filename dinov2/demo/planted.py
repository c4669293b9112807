"""A small crawl with known truth: patches of the bundled photographs, with planted copies.

Each image has the facts that curation should find: the image that it is a copy of, whether that is an evaluation image,
and the photograph that it was cut from. (Images of one photograph look alike.)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from dinov2.data.photographs import BundledPhotographs
from dinov2.demo.patches import Half, half_of

Role = Literal["pool", "evaluation", "seed"]
Random = np.random.Generator


@dataclass(frozen=True)
class PlantedImage:
    """An image of the crawl, of the evaluation set or of the seeds.

    Attributes:
        name: unique name of letters, digits and hyphens.
        content: bytes of its file, JPEG or PNG.
        role: "pool" for crawled images; "evaluation" for images that training must avoid; "seed" for images to retrieve
            similar ones for.
        original: name of the image that it is a copy of, or its own name.
        kind: how a copy was made; "original" for an image that was cut, "distractor" for one that is no photograph.
        photograph: name of the photograph that it was cut from; "" for a distractor.
    """

    name: str
    content: bytes
    role: Role
    original: str
    kind: str
    photograph: str


def planted_images(
    seed: int = 0,
    *,
    size: int = 128,
    per_photograph: int = 40,
    copied: float = 0.3,
    distractors: int = 100,
    half: Half | None = None,
) -> list[PlantedImage]:
    """The crawl, the evaluation set and the seeds; equal arguments give equal images.

    Each photograph is cut into tiles that share no pixel, and at most ``per_photograph`` of them are used. One tile in
    ten is an evaluation image, one in ten is a seed, and the rest are in the pool. The pool also has copies: one to
    three of different kinds for a share ``copied`` of its tiles, and one for every second evaluation image.

    Args:
        seed: seed of all random numbers.
        size: side of a tile in pixels.
        per_photograph: largest number of tiles of a photograph.
        copied: share of the pool's tiles that have copies.
        distractors: number of images that are not photographs: noise, gradients and flat colours.
        half: cut only from this half of each photograph; None cuts from the whole photograph.
    """
    rng, images = np.random.default_rng(seed), list[PlantedImage]()
    photographs = BundledPhotographs()
    for photograph, pixels in zip(photographs.names, photographs, strict=True):  # type: ignore[call-overload]
        tiles = _tiles(pixels if half is None else half_of(pixels, half), size)
        chosen = rng.permutation(len(tiles))[:per_photograph]
        for place, tile in enumerate(chosen.tolist()):
            role: Role = "evaluation" if place % 10 == 3 else "seed" if place % 10 == 7 else "pool"
            name = f"{photograph}-{tile:03d}"
            picture = Image.fromarray(tiles[tile])
            images.append(PlantedImage(name, _jpeg(picture, 92), role, name, "original", photograph))
            wanted = {"seed": 0, "evaluation": int(rng.random() < 0.5), "pool": 0}[role]
            if role == "pool" and rng.random() < copied:
                wanted = int(rng.integers(1, 4))
            for kind in rng.permutation(list(COPIES))[:wanted].tolist():
                content = COPIES[kind](picture, rng)
                images.append(PlantedImage(f"{name}-{kind}", content, "pool", name, kind, photograph))
    for number in range(distractors):
        name = f"distractor-{number:03d}"
        images.append(PlantedImage(name, _distractor(size, rng), "pool", name, "distractor", ""))
    return images


def _tiles(pixels: npt.NDArray[np.uint8], size: int) -> list[npt.NDArray[np.uint8]]:
    """All tiles [size, size, 3] of a grid that is centred on a photograph."""
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    top, left = (pixels.shape[0] - rows * size) // 2, (pixels.shape[1] - columns * size) // 2
    return [
        pixels[top + row * size : top + (row + 1) * size, left + column * size : left + (column + 1) * size]
        for row in range(rows)
        for column in range(columns)
    ]


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def _crop(picture: Image.Image, rng: Random) -> Image.Image:
    """Cut a part of 50 to 90 % of the area."""
    width, height = picture.size
    side = float(np.sqrt(rng.uniform(0.5, 0.9)))
    w, h = round(width * side), round(height * side)
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    return picture.crop((left, top, left + w, top + h))


def _colour(picture: Image.Image, rng: Random) -> Image.Image:
    """Change brightness, contrast and saturation, each by up to 40 %."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(float(rng.uniform(0.6, 1.4)))
    return picture


def _overlay(picture: Image.Image, rng: Random) -> Image.Image:
    """Add a bar with a line of text and a round sticker, as in memes and shops."""
    picture, (width, height) = picture.copy(), picture.size
    draw = ImageDraw.Draw(picture)
    bar = round(height * rng.uniform(0.1, 0.18))
    top = int(rng.choice([0, height - bar]))
    draw.rectangle((0, top, width, top + bar), fill=(0, 0, 0))
    draw.text((4, top + bar // 6), "look at this", fill=(255, 255, 255))
    radius = round(height * rng.uniform(0.08, 0.12))
    x, y = int(rng.integers(radius, width - radius)), int(rng.integers(radius, height - radius))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 205, 60))
    return picture


def _resized(picture: Image.Image, rng: Random) -> Image.Image:
    """Resize by a factor from 0.5 to 1.5."""
    side = round(picture.width * rng.uniform(0.5, 1.5))
    return picture.resize((side, side), Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image, Random], bytes]] = {
    "crop": lambda picture, rng: _jpeg(_crop(picture, rng), 90),
    "jpeg": lambda picture, rng: _jpeg(picture, int(rng.integers(20, 60))),
    "colour": lambda picture, rng: _jpeg(_colour(picture, rng), 90),
    "flip": lambda picture, rng: _jpeg(ImageOps.mirror(picture), 90),
    "overlay": lambda picture, rng: _jpeg(_overlay(picture, rng), 90),
    "resize": lambda picture, rng: _jpeg(_resized(picture, rng), 90),
    "several": lambda picture, rng: _jpeg(_colour(ImageOps.mirror(_crop(picture, rng)), rng), 70),
}
"""Functions that make copies, by the kind of copy."""


def _distractor(size: int, rng: Random) -> bytes:
    """A PNG that is not a photograph: fine or coarse noise, a gradient, or a flat colour."""
    kind = int(rng.integers(3))
    if kind == 0:
        coarse = int(rng.choice([8, 16, 32, 64]))
        noise = Image.fromarray(rng.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8))
        picture = noise.resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    elif kind == 1:
        corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        picture = corners.resize((size, size), Image.Resampling.BILINEAR)
    else:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        picture = Image.new("RGB", (size, size), (red, green, blue))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
