"""Reduction of images while they are decoded, in parts, so that time and memory stay small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from PIL import Image

DECODING_BYTES = 2**30
"""An image that takes more memory than this while it is decoded at a reduced size is refused."""

PART_PIXELS = 2**21  # pixels that are converted at once

# Bytes that Pillow needs for a pixel of these formats beside its own image: the frames of their decoders.
_OF_DECODER = {"WEBP": 12, "AVIF": 8}
_CODESTREAM = b"\xff\x4f\xff\x51"  # the first two markers of JPEG 2000
_CODING_STYLE = 0xFF52


def target_size(width: int, height: int, side: int, least: int) -> tuple[int, int]:
    """Width and height of a ``width`` x ``height`` image whose longer side is reduced to ``side``, or as far as leaves
    ``least`` to its shorter side. It is never enlarged."""
    scale = min(max(side / max(width, height), least / min(width, height)), 1.0)
    return max(1, round(width * scale)), max(1, round(height * scale))


def read_smaller(image: Image.Image, target: tuple[int, int], content: bytes) -> None:
    """Tell the decoder of an opened JPEG or JPEG 2000 to read a half, a quarter, ... of its size, not below ``target``.

    Raises:
        ValueError: decoding would take more than :data:`DECODING_BYTES`.
    """
    pixels = image.width * image.height
    bands = len(image.getbands())
    if image.format in ("JPEG", "MPO"):
        image.draft(None, target)
        read = image.width * image.height
        waiting = int(2 * pixels * _samples_a_pixel(image)) if image.info.get("progressive") else 0  # all coefficients
        refuse_large(4 * read + waiting, content)
    elif image.format == "JPEG2000":
        # Its halves are sharp and rough, so they are taken down to twice the target only.
        factor = max(1, min(image.width // (2 * target[0]), image.height // (2 * target[1])))
        steps = min(int(math.log2(factor)), _halvings(content))
        image.reduce = steps  # type: ignore[method-assign, assignment]
        refuse_large((6 * bands + 4) * pixels // 4**steps + 2 * len(content), content)
    else:
        stored, strip = stored_bytes(image), 0
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            bits = sum(tags.get(258, (8,)))
            rows = min(tags.get(278, image.height), image.height) if 322 not in tags else min(tags.get(323, 1), 2**12)
            strip = rows * image.width * bits // 8
            stored *= 1 if tags.get(274, 1) == 1 else 2  # Pillow turns it upright while it loads
        converted = 4 if target == image.size and image.mode != "RGB" else 0  # as a whole
        refuse_large((stored + converted + _OF_DECODER.get(image.format or "", 0)) * pixels + strip, content)


def stored_bytes(image: Image.Image) -> int:
    """Bytes of memory in which Pillow holds a pixel."""
    if len(image.getbands()) > 1:
        return 4
    return {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if ";16" in image.mode else 4)


def refuse_large(size: int, content: bytes) -> None:
    """Refuse an image whose decoding takes ``size`` bytes beside its file."""
    needed = size + len(content)
    if needed > DECODING_BYTES:
        raise ValueError(
            f"decoding it takes about {needed / 2**20:,.0f} MB of memory; at most {DECODING_BYTES / 2**20:,.0f} are"
            " allowed here"
        )


def reduced(part: Callable[[int, int], Image.Image], width: int, height: int, target: tuple[int, int]) -> Image.Image:
    """Reduce a ``width`` x ``height`` image to ``target``: first blocks of pixels are averaged, to no less than twice
    the target, then Pillow's antialiased Hamming filter does the rest.

    Args:
        part: returns the rows from the first number to before the second, as an RGB image.
        width: width of all parts.
        height: height of all parts together.
        target: width and height of the result.

    Returns:
        an RGB image of the size ``target``.
    """
    if target == (width, height):
        return part(0, height)
    across, down = max(1, width // (2 * target[0])), max(1, height // (2 * target[1]))
    rows = max(1, PART_PIXELS // width // down) * down
    if rows >= height:
        small = _averaged(part(0, height), across, down)
    else:
        small = Image.new("RGB", (math.ceil(width / across), math.ceil(height / down)))
        for top in range(0, height, rows):
            small.paste(_averaged(part(top, min(top + rows, height)), across, down), (0, top // down))
    if small.size != target:
        small = small.resize(target, Image.Resampling.HAMMING, box=(0, 0, width / across, height / down))
    return small


def _averaged(image: Image.Image, across: int, down: int) -> Image.Image:
    return image if across == down == 1 else image.reduce((across, down))


def _samples_a_pixel(image: Image.Image) -> float:
    """Samples of all components of an opened JPEG for each of its pixels: 1.5 with colours of half the size, 3 with
    colours of full size."""
    layers: Any = getattr(image, "layer", ())
    full = max((across * down for _, across, down, *_ in layers), default=1)
    return sum(across * down for _, across, down, *_ in layers) / full or float(len(image.getbands()))


def _halvings(content: bytes) -> int:
    """The number of times that a JPEG 2000 file can be halved; 0 if its header is damaged."""
    place = content.find(_CODESTREAM) + 2
    while 2 <= place <= len(content) - 4:
        marker, length = int.from_bytes(content[place : place + 2]), int.from_bytes(content[place + 2 : place + 4])
        if marker == _CODING_STYLE:
            return content[place + 9] if place + 9 < len(content) else 0
        if marker < 0xFF00 or length < 2:
            break
        place += 2 + length
    return 0
