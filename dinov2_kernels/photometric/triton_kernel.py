"""The photometric augmentation in Triton: the operator of :mod:`dinov2_kernels.photometric.reference` on CUDA.

Legend: images uint8 [N, H, W, 3]; plan [N, 12] float32, whose columns :class:`.plan.Column` names; levels [N, 3, H, W]
float32, which only images with a blur use; out [N, 3, H, W]. The host does not read the plan: it launches all three
kernels, and a program that has nothing to do for its image ends at once. No atomics: the mean luma of an image is the
sum of a fixed number of parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dinov2_kernels.photometric.plan import COLUMNS, Column, Jitter

PARTS = 32  # parts of an image, each with its own sum of luma
PIXELS = 1024  # pixels of a program

_ROW = tl.constexpr(COLUMNS)
_FLIP = tl.constexpr(int(Column.FLIP))
_JITTERS = tl.constexpr(int(Column.JITTERS))
_GRAYSCALE = tl.constexpr(int(Column.GRAYSCALE))
_BLUR_SIGMA = tl.constexpr(int(Column.BLUR_SIGMA))
_THRESHOLD = tl.constexpr(int(Column.SOLARIZE_THRESHOLD))
_NONE = tl.constexpr(int(Jitter.NONE))
_BRIGHTNESS = tl.constexpr(int(Jitter.BRIGHTNESS))
_CONTRAST = tl.constexpr(int(Jitter.CONTRAST))
_SATURATION = tl.constexpr(int(Jitter.SATURATION))
_HUE = tl.constexpr(int(Jitter.HUE))


def photometric(
    images: Tensor, plan: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """images [N, H, W, 3] uint8, recoloured by the plan and normalised: [N, 3, H, W] of `dtype`.

    Bytes per pixel: reads 3 for the mean of images with a contrast jitter, and 3 for all images, from L2 if the images
    fit; writes three elements. With a blur, it also writes 12 bytes in between and reads a quarter more than that.
    """
    N, H, W, _ = images.shape
    out = images.new_empty(N, 3, H, W, dtype=dtype)
    if out.numel() == 0:
        return out
    sums = images.new_empty(N, PARTS, dtype=torch.float32)  # sums of luma, only for images with a contrast jitter
    levels = images.new_empty(N, 3, H, W, dtype=torch.float32)  # only for images with a blur
    scale = tuple(1 / (255 * s) for s in std)
    shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    strips = 3 * triton.cdiv(W, 128) * triton.cdiv(H, 32)
    with torch.cuda.device_of(images):
        _sum_luma[(N * PARTS,)](images, plan, sums, H, W, PARTS=PARTS, PIXELS=PIXELS)
        _recolour[(N * triton.cdiv(H * W, PIXELS),)](
            images, plan, sums, levels, out, H, W, scale, shift, PARTS=PARTS, PIXELS=PIXELS
        )
        _blur[(N * strips,)](levels, plan, out, H, W, scale, shift, ROWS=32, COLUMNS=128)
    return out


@triton.jit
def _sum_luma(images, plan, sums, H, W, PARTS: tl.constexpr, PIXELS: tl.constexpr):
    """Sum of the luma in every part of an image, before its contrast jitter."""
    n, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    row = plan + n * _ROW
    steps = 4  # before the contrast jitter
    for i in tl.static_range(4):
        steps = tl.where(tl.load(row + _JITTERS + 2 * i) == _CONTRAST, i, steps)
    if steps < 4:
        total = tl.zeros([PIXELS], tl.float32)
        for start in range(part * PIXELS, H * W, PARTS * PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            red, green, blue = _load(images + n * H * W * 3, row, pixel, H, W)
            for i in tl.static_range(3):
                if i < steps:
                    jitter, strength = tl.load(row + _JITTERS + 2 * i), tl.load(row + _JITTERS + 2 * i + 1)
                    red, green, blue = _adjust(red, green, blue, jitter, strength, 0.0)
            total += tl.where(pixel < H * W, _luma(red, green, blue), 0.0)
        tl.store(sums + n * PARTS + part, tl.sum(total))


@triton.jit
def _recolour(images, plan, sums, levels, out, H, W, scale, shift, PARTS: tl.constexpr, PIXELS: tl.constexpr):
    """All steps before the blur. Images with a blur write their levels; the others are finished."""
    pieces = tl.cdiv(H * W, PIXELS)
    n = (tl.program_id(0) // pieces).to(tl.int64)
    pixel = tl.program_id(0) % pieces * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < H * W
    row = plan + n * _ROW
    mean = tl.sum(tl.load(sums + n * PARTS + tl.arange(0, PARTS))) / (H * W)
    red, green, blue = _load(images + n * H * W * 3, row, pixel, H, W)
    for i in tl.static_range(4):
        jitter, strength = tl.load(row + _JITTERS + 2 * i), tl.load(row + _JITTERS + 2 * i + 1)
        red, green, blue = _adjust(red, green, blue, jitter, strength, mean)
    gray = tl.load(row + _GRAYSCALE) != 0
    red, green, blue = _adjust(red, green, blue, tl.where(gray, _SATURATION, _NONE), 0.0, mean)

    first = n * 3 * H * W + pixel  # in the red plane
    if tl.load(row + _BLUR_SIGMA) > 0:
        tl.store(levels + first, red, mask=inside)
        tl.store(levels + first + H * W, green, mask=inside)
        tl.store(levels + first + 2 * H * W, blue, mask=inside)
    else:
        threshold = tl.load(row + _THRESHOLD)
        tl.store(out + first, _finish(red, threshold, scale[0], shift[0]), mask=inside)
        tl.store(out + first + H * W, _finish(green, threshold, scale[1], shift[1]), mask=inside)
        tl.store(out + first + 2 * H * W, _finish(blue, threshold, scale[2], shift[2]), mask=inside)


@triton.jit
def _blur(levels, plan, out, H, W, scale, shift, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A strip of one channel, from top to bottom: rows are blurred horizontally and pass through a window of nine."""
    strips, segments = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    plane = tl.program_id(0) // (strips * segments)
    n, channel = (plane // 3).to(tl.int64), plane % 3
    strip = tl.program_id(0) // segments % strips
    top = tl.program_id(0) % segments * ROWS
    sigma = tl.load(plan + n * _ROW + _BLUR_SIGMA)
    if sigma > 0:
        threshold = tl.load(plan + n * _ROW + _THRESHOLD)
        factor = tl.where(channel == 0, scale[0], tl.where(channel == 1, scale[1], scale[2]))
        offset = tl.where(channel == 0, shift[0], tl.where(channel == 1, shift[1], shift[2]))
        weight = _weights(sigma)
        column = strip * COLUMNS + tl.arange(0, COLUMNS)
        place = ()
        for tap in tl.static_range(9):
            place += (_reflect(column + (tap - 4), W),)
        levels += (n * 3 + channel) * H * W
        out += (n * 3 + channel) * H * W
        nothing = tl.zeros([COLUMNS], tl.float32)
        a, b, c, d, e, f, g, h, i = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
        for y in range(top - 8, top + ROWS):
            line = levels + _reflect(y + 4, H) * W
            along = nothing
            for tap in tl.static_range(9):
                along += weight[tap] * tl.load(line + place[tap])
            a, b, c, d, e, f, g, h, i = b, c, d, e, f, g, h, i, along
            blurred = weight[4] * e + weight[3] * (d + f) + weight[2] * (c + g)
            blurred += weight[1] * (b + h) + weight[0] * (a + i)
            result = _finish(blurred, threshold, factor, offset)
            tl.store(out + y * W + column, result, mask=(column < W) & (y >= top) & (y < H))


@triton.jit
def _load(image, row, pixel, H, W):
    """The channels of some pixels of the flipped image [H, W, 3], as levels."""
    mirror = tl.load(row + _FLIP) != 0
    source = tl.where(mirror, pixel + (W - 1 - 2 * (pixel % W)), pixel)
    inside = pixel < H * W
    red = tl.load(image + 3 * source, mask=inside, other=0).to(tl.float32)
    green = tl.load(image + 3 * source + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(image + 3 * source + 2, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _adjust(red, green, blue, jitter, strength, mean):
    """One jitter; `mean` is the mean luma for the contrast jitter."""
    if jitter == _BRIGHTNESS:
        red, green, blue = _clip(strength * red), _clip(strength * green), _clip(strength * blue)
    elif jitter == _HUE:
        red, green, blue = _turn_hue(red, green, blue, strength)
    elif jitter != _NONE:
        gray = tl.where(jitter == _CONTRAST, mean, _luma(red, green, blue))
        red = _clip(gray + strength * (red - gray))
        green = _clip(gray + strength * (green - gray))
        blue = _clip(gray + strength * (blue - gray))
    return red, green, blue


@triton.jit
def _turn_hue(red, green, blue, turn):
    """Hue is an angle in sixths of the circle, as in the reference."""
    value, least = tl.maximum(red, tl.maximum(green, blue)), tl.minimum(red, tl.minimum(green, blue))
    chroma = value - least
    inverse = 1 / tl.where(chroma > 0, chroma, 1.0)
    from_green, from_blue = 2 + (blue - red) * inverse, 4 + (red - green) * inverse
    hue = tl.where(value == red, (green - blue) * inverse, tl.where(value == green, from_green, from_blue))
    hue += 6 * (turn - tl.floor(turn))  # from -1 to 11
    return _channel(hue, value, chroma), _channel(hue - 2, value, chroma), _channel(hue - 4, value, chroma)


@triton.jit
def _channel(hue, value, chroma):
    """Level of a channel for a pixel whose hue is `hue` sixths from the channel's own hue, between -5 and 11."""
    away = tl.abs(hue - 6 * tl.floor(hue / 6 + 0.5))  # 0 to 3
    return value - chroma * tl.minimum(1.0, tl.maximum(0.0, away - 1))


@triton.jit
def _luma(red, green, blue):
    return 0.299 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clip(level):
    return tl.minimum(255.0, tl.maximum(0.0, level))


@triton.jit
def _finish(level, threshold, scale, shift):
    """Solarised and normalised."""
    return tl.where(level >= threshold, 255 - level, level) * scale + shift


@triton.jit
def _weights(sigma):
    """The nine taps of a Gaussian, with sum 1."""
    w1, w2 = tl.exp(-0.5 / (sigma * sigma)), tl.exp(-2.0 / (sigma * sigma))
    w3, w4 = tl.exp(-4.5 / (sigma * sigma)), tl.exp(-8.0 / (sigma * sigma))
    w0 = 1 / (1 + 2 * (w1 + w2 + w3 + w4))
    w1, w2, w3, w4 = w0 * w1, w0 * w2, w0 * w3, w0 * w4
    return w4, w3, w2, w1, w0, w1, w2, w3, w4


@triton.jit
def _reflect(place, size):
    """The pixel that replaces one outside the image (BORDER_REFLECT_101); at most 8 sizes before its first pixel."""
    period = tl.maximum(2 * (size - 1), 1)
    rest = (place + 8 * period) % period
    return tl.minimum(rest, period - rest)
