"""Multi-crop augmentation: two large and several small random views of one image, each recoloured on its own.

The recipe is DINOv2's (arXiv 2304.07193, appendix B.3, which takes it from DINO and BYOL).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dinov2.data import photometric
from dinov2.data.cropping import random_box, resized_crop, uniform
from dinov2_kernels._extras import require

# Chance of a blur for the first global, the second global and the local crops. "paper" is what was meant and written;
# "released" is what trained the published weights: the reference implementation passes 1 - p for p.
BLUR_PROBABILITIES = {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random views of an image. The defaults are DINOv2's.

    Attributes:
        global_size: side of the two global crops, in pixels.
        local_size: side of the local crops, in pixels.
        local_crops: how many local crops.
        global_scale: smallest and largest share of the image's area in a global crop.
        local_scale: the same for local crops.
        ratio: smallest and largest width-to-height ratio of a crop before it is resized.
        flip: chance of a left-right flip.
        jitter: chance of a colour jitter: brightness, contrast, saturation and hue in random order.
        brightness: its factor is uniform in 1 - brightness ... 1 + brightness.
        contrast: as brightness.
        saturation: as brightness.
        hue: the hue turns by up to this share of the circle, either way; at most 0.5.
        grayscale: chance of losing all colour.
        blur: how often a crop is blurred: ``"released"`` as for the published weights (first global crop 0, second
            0.9, local 0.5), ``"paper"`` as written (1, 0.1, 0.5).
        blur_sigma: smallest and largest standard deviation of the blur, in pixels.
        blur_kernel: side of the blur's kernel, odd, in pixels.
        solarize: chance of solarisation, of the second global crop only.
        solarize_threshold: levels from this one on (of 0 ... 255) are inverted.
        mean: subtracted from each channel, on a scale of 0 ... 1.
        std: each channel is divided by it, after the subtraction.
    """

    global_size: int = 224
    local_size: int = 96
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: Literal["released", "paper"] = "released"
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 9
    solarize: float = 0.2
    solarize_threshold: int = 128
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")
        for name in ("flip", "jitter", "grayscale", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a chance in [0, 1], but is {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], but is {getattr(self, name)}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= 1, but is {(low, high)}")
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, but is {(low, high)}")
        if self.local_crops < 0:
            raise ValueError(f"local_crops must not be negative, but is {self.local_crops}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], but is {self.hue}")
        if self.blur not in BLUR_PROBABILITIES:
            raise ValueError(f"blur must be one of {', '.join(BLUR_PROBABILITIES)}, but is {self.blur!r}")
        if self.blur_kernel < 1 or self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel must be odd and positive, but is {self.blur_kernel}")


@dataclass(frozen=True)
class _View:
    """What differs between the kinds of crop."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float


class MultiCropAugmentation:
    """Turns an image into two global and ``config.local_crops`` local crops.

    Each crop is cut and resized (antialiased bicubic), flipped, jittered, made grey, blurred, solarised and
    normalised with chances of its own. All randomness comes from the generator that is passed in. About 7 ms for
    2 x 224 + 8 x 96 pixels from a 500 x 400 image, on one core.

    Raises:
        ImportError: OpenCV is missing (extra ``train``).
    """

    def __init__(self, config: AugmentationConfig) -> None:
        require("cv2", extra="train", purpose="MultiCropAugmentation")
        self.config = config
        blurs = BLUR_PROBABILITIES[config.blur]
        self._global_views = (
            _View(config.global_size, config.global_scale, blurs[0], 0.0),
            _View(config.global_size, config.global_scale, blurs[1], config.solarize),
        )
        self._local_view = _View(config.local_size, config.local_scale, blurs[2], 0.0)
        self._jitters = [
            (operation, centre - strength, centre + strength)
            for operation, centre, strength in (
                (photometric.adjust_brightness, 1, config.brightness),
                (photometric.adjust_contrast, 1, config.contrast),
                (photometric.adjust_saturation, 1, config.saturation),
                (photometric.adjust_hue, 0, config.hue),
            )
            if strength > 0
        ]

    def __call__(
        self, image: npt.NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
        """Draw the views of one image.

        Args:
            image: uint8 RGB ``[H, W, 3]``.
            rng: decides everything that is random.

        Returns:
            Two global crops float32 ``[3, global_size, global_size]`` and the local crops float32
            ``[3, local_size, local_size]``, normalised.

        Raises:
            ValueError: the image is not uint8 ``[H, W, 3]``.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"image must be uint8 [H, W, 3], but is {image.dtype} {list(image.shape)}")
        global_crops = [self._draw(image, view, rng) for view in self._global_views]
        local_crops = [self._draw(image, self._local_view, rng) for _ in range(self.config.local_crops)]
        return global_crops, local_crops

    def _draw(self, image: npt.NDArray[np.uint8], view: _View, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        config = self.config
        height, width, _ = image.shape
        box = random_box(width, height, scale=view.scale, ratio=config.ratio, rng=rng)
        crop = resized_crop(image, box, view.size)
        if rng.random() < config.flip:
            crop = photometric.flip(crop)
        if rng.random() < config.jitter:
            for index in rng.permutation(len(self._jitters)):
                operation, low, high = self._jitters[index]
                crop = operation(crop, uniform(rng, low, high))
        if rng.random() < config.grayscale:
            crop = photometric.grayscale(crop)
        if rng.random() < view.blur:
            crop = photometric.gaussian_blur(crop, uniform(rng, *config.blur_sigma), config.blur_kernel)
        if rng.random() < view.solarize:
            crop = photometric.solarize(crop, config.solarize_threshold)
        return normalize(crop, config.mean, config.std)


def normalize(
    image: npt.NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """``(image / 255 - mean) / std``, channels first: uint8 ``[H, W, 3]`` to float32 ``[3, H, W]``."""
    scale, shift = _scale_and_shift(mean, std)
    normalized = np.empty((3, *image.shape[:2]), dtype=np.float32)
    np.multiply(image.transpose(2, 0, 1), scale, out=normalized)
    normalized += shift
    return normalized


@functools.cache
def _scale_and_shift(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Float32 ``[3, 1, 1]`` each, such that ``level * scale + shift`` is the normalised value."""
    channels = np.array([mean, std])[:, :, None, None]  # [2, 3, 1, 1]
    return (1 / (255 * channels[1])).astype(np.float32), (-channels[0] / channels[1]).astype(np.float32)
