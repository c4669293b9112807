"""DINOv2's augmentation after the crop (arXiv:2304.07193, after BYOL, arXiv:2006.07733): the definition of the kernels.

An image x [3, H, W] has levels from 0 to 255 in floating point, never rounded between steps. Steps in plan order:

    brightness f    clip(f x)
    contrast f      clip(m + f (x - m))       m: mean luma of the image before this step
    saturation f    clip(y + f (x - y))       y: luma of each pixel; f = 0 is grayscale
    hue t           HSV with its hue turned by t circles
    blur s          Gaussian of 9 x 9 taps and standard deviation s, borders reflected without their outermost pixel
    solarise t      255 - x where x >= t

with clip to [0, 255] and luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as in Pillow. Normalisation comes last:
(x / 255 - mean) / std.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinov2_kernels.photometric.plan import ImagePlan, Jitter, PhotometricPlan

BLUR_TAPS = 9
LUMA = (0.299, 0.587, 0.114)


def photometric(
    images: Tensor, plan: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """images: uint8 [N, H, W, 3], plan: a plan's table [N, 12]; returns [N, 3, H, W] of a floating dtype.

    Arithmetic is in float32, or in float64 if ``dtype`` is float64.
    """
    N, H, W, _ = images.shape
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    offset, scale = (images.new_tensor(values, dtype=computed)[:, None, None] for values in (mean, std))  # [3, 1, 1]
    out = images.new_empty(N, 3, H, W, dtype=dtype)
    for image, steps, target in zip(images, PhotometricPlan(plan).images(), out, strict=True):
        recoloured = recolour(image.permute(2, 0, 1).to(computed), steps)
        target.copy_((recoloured / 255 - offset) / scale)
    return out


def recolour(x: Tensor, steps: ImagePlan) -> Tensor:
    """All steps before the normalisation: levels [3, H, W] to levels."""
    if x.numel() == 0:
        return x
    if steps.flip:
        x = x.flip(-1)
    for jitter, strength in steps.jitters:
        x = ADJUST[jitter](x, strength)
    if steps.grayscale:
        x = adjust_saturation(x, 0.0)
    if steps.blur_sigma > 0:
        x = blur(x, steps.blur_sigma)
    return torch.where(x >= steps.solarize_threshold, 255 - x, x)


def luma(x: Tensor) -> Tensor:
    """[3, H, W] to [1, H, W]."""
    return LUMA[0] * x[0:1] + LUMA[1] * x[1:2] + LUMA[2] * x[2:3]


def adjust_brightness(x: Tensor, factor: float) -> Tensor:
    return (factor * x).clamp(0, 255)


def adjust_contrast(x: Tensor, factor: float) -> Tensor:
    mean = luma(x).mean()
    return (mean + factor * (x - mean)).clamp(0, 255)


def adjust_saturation(x: Tensor, factor: float) -> Tensor:
    gray = luma(x)
    return (gray + factor * (x - gray)).clamp(0, 255)


def turn_hue(x: Tensor, turn: float) -> Tensor:
    """Hue is an angle in sixths of the circle: red at 0, green at 2, blue at 4."""
    red, green, blue = x
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)  # [H, W] each
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(value == blue, 4 + (red - green) / divisor, 0)
    hue = torch.where(value == green, 2 + (blue - red) / divisor, hue)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + 6 * turn
    # A channel has the full value within a sixth of the circle on either side of its own hue. Over the next sixth it
    # falls to value - chroma.
    away = [((hue - centre + 3) % 6 - 3).abs() for centre in (0, 2, 4)]
    return torch.stack([value - chroma * (distance - 1).clamp(0, 1) for distance in away])


def blur(x: Tensor, sigma: float) -> Tensor:
    reach = BLUR_TAPS // 2
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device) / sigma) ** 2)
    weight = weight / weight.sum()  # [9]
    for dim in (1, 2):
        size = x.shape[dim]
        places = [reflect(place, size) for place in range(-reach, size + reach)]
        padded = x.index_select(dim, torch.tensor(places, device=x.device))
        taps = [factor * padded.narrow(dim, tap, size) for tap, factor in enumerate(weight)]
        x = torch.stack(taps).sum(0)
    return x


def reflect(place: int, size: int) -> int:
    """The pixel that replaces one outside the image: -1 becomes 1, size becomes size - 2 (BORDER_REFLECT_101)."""
    period = max(1, 2 * (size - 1))
    return min(place % period, period - place % period)


ADJUST: dict[Jitter, Callable[[Tensor, float], Tensor]] = {
    Jitter.BRIGHTNESS: adjust_brightness,
    Jitter.CONTRAST: adjust_contrast,
    Jitter.SATURATION: adjust_saturation,
    Jitter.HUE: turn_hue,
}
