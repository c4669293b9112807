"""Multi-crop augmentation: two large and several small random views of one image, each recoloured on its own.

The recipe is DINOv2's (arXiv 2304.07193, appendix B.3, which takes it from DINO and BYOL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dinov2.data import multichannel
from dinov2.data.cropping import random_box, resized_crop
from dinov2.data.decoding import LEVELS, Pixels
from dinov2_kernels.photometric import ImagePlan, PhotometricDistribution, PhotometricPlan, photometric
from dinov2_kernels.photometric.reference import BLUR_TAPS

# Chance of a blur for the first global, the second global and the local crops. "paper" is what was meant and written;
# "released" is what trained the published weights: the reference implementation passes 1 - p for p.
BLUR_PROBABILITIES = {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}
# What only images in colour have.
COLOUR = {"saturation": 0.2, "hue": 0.1, "grayscale": 0.2}


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
        saturation: as brightness; None is 0.2 for images of three channels and 0, the only choice, for others.
        hue: the hue turns by up to this share of the circle, either way; at most 0.5. None is 0.1 or 0 likewise.
        grayscale: chance of losing all colour; None is 0.2 or 0 likewise.
        blur: how often a crop is blurred: ``"released"`` as for the published weights (first global crop 0, second
            0.9, local 0.5), ``"paper"`` as written (1, 0.1, 0.5).
        blur_sigma: smallest and largest standard deviation of the blur, in pixels.
        blur_kernel: side of the blur's kernel, odd, in pixels; 9 for images of three channels.
        solarize: chance of solarisation, of the second global crop only.
        solarize_threshold: levels from this one on (of 0 ... 255) are inverted.
        mean: subtracted from each channel, on a scale where 1 is level 255 of 8 bits, 65535 of 16 bits, 1 of float32.
            Its length is the number of channels.
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
    saturation: float | None = None
    hue: float | None = None
    grayscale: float | None = None
    blur: Literal["released", "paper"] = "released"
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 9
    solarize: float = 0.2
    solarize_threshold: int = 128
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, but is {getattr(self, name)}")
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError(
                "mean and std must have one value for each channel, those of std positive, but are"
                f" {self.mean} and {self.std}"
            )
        for name in COLOUR:
            if self.channels != 3 and getattr(self, name):
                raise ValueError(
                    f"{name} is for images of red, green and blue, so it must be 0 for the {self.channels} channels of"
                    f" mean and std, but is {getattr(self, name)}"
                )
        for name in ("flip", "jitter", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a chance in [0, 1], but is {getattr(self, name)}")
        for name in ("brightness", "contrast"):
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
        for name, most in {"saturation": 1, "hue": 0.5, "grayscale": 1}.items():
            if not 0 <= self.colour(name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], but is {getattr(self, name)}")
        if self.blur not in BLUR_PROBABILITIES:
            raise ValueError(f"blur must be one of {', '.join(BLUR_PROBABILITIES)}, but is {self.blur!r}")
        if self.blur_kernel < 1 or self.blur_kernel % 2 == 0:
            raise ValueError(f"blur_kernel must be odd and positive, but is {self.blur_kernel}")
        if self.channels == 3 and self.blur_kernel != BLUR_TAPS:
            raise ValueError(f"blur_kernel must be {BLUR_TAPS} for images of three channels, but is {self.blur_kernel}")

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    def colour(self, name: str) -> float:
        """``saturation``, ``hue`` or ``grayscale``, with what None stands for."""
        given: float | None = getattr(self, name)
        if given is not None:
            return given
        return COLOUR[name] if self.channels == 3 else 0.0

    def plans(self, *, blur: float, solarize: float = 0.0) -> PhotometricDistribution:
        """What happens to a crop after it is cut, where these are its chances of a blur and of solarisation."""
        return PhotometricDistribution(
            flip=self.flip,
            jitter=self.jitter,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.colour("saturation"),
            hue=self.colour("hue"),
            grayscale=self.colour("grayscale"),
            blur=blur,
            blur_sigma=self.blur_sigma,
            solarize=solarize,
            solarize_threshold=self.solarize_threshold,
        )


@dataclass(frozen=True)
class View:
    """One kind of crop: its side in pixels, its smallest and largest share of the image, and what happens to it."""

    size: int
    scale: tuple[float, float]
    plans: PhotometricDistribution


class Crop(NamedTuple):
    """A crop as it was cut, ``[size, size, C]`` of the image's type, and what is still to be done to it."""

    pixels: Pixels
    plan: ImagePlan


class MultiCropAugmentation:
    """Turns an image into two global and ``config.local_crops`` local crops.

    Each crop is cut and resized (antialiased bicubic), flipped, jittered, made grey, blurred, solarised and
    normalised with chances of its own; images of other than three channels know no saturation, hue or grey. All
    randomness comes from the generator that is passed in. About 2.2 ms for 2 x 224 + 8 x 96 pixels from a 500 x 400
    RGB image, on one core; 1.4 ms of it for :meth:`cut`.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        self.config = config
        first, second, local = BLUR_PROBABILITIES[config.blur]
        self.global_views = (
            View(config.global_size, config.global_scale, config.plans(blur=first)),
            View(config.global_size, config.global_scale, config.plans(blur=second, solarize=config.solarize)),
        )
        self.local_view = View(config.local_size, config.local_scale, config.plans(blur=local))
        self._types = ("uint8",) if config.channels == 3 else tuple(map(str, LEVELS))

    def __call__(
        self, image: Pixels, rng: np.random.Generator
    ) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
        """Draw the views of one image.

        Args:
            image: uint8 RGB ``[H, W, 3]``, or uint8, uint16 or float32 ``[H, W, C]`` where the configuration has
                another number of channels.
            rng: decides everything that is random.

        Returns:
            Two global crops float32 ``[C, global_size, global_size]`` and the local crops float32
            ``[C, local_size, local_size]``, normalised.

        Raises:
            ValueError: the image is of another type or shape.
        """
        global_crops, local_crops = self.cut(image, rng)
        return self.finish(global_crops), self.finish(local_crops)

    def cut(self, image: Pixels, rng: np.random.Generator) -> tuple[list[Crop], list[Crop]]:
        """The views of one image before :meth:`finish`, which draws nothing; arguments and errors as for a call."""
        channels = self.config.channels
        if image.dtype.name not in self._types or image.ndim != 3 or image.shape[2] != channels or image.size == 0:
            raise ValueError(
                f"image must be {' or '.join(self._types)} [H, W, {channels}], but is {image.dtype} {list(image.shape)}"
            )
        global_crops = [self._cut(image, view, rng) for view in self.global_views]
        return global_crops, [self._cut(image, self.local_view, rng) for _ in range(self.config.local_crops)]

    def _cut(self, image: Pixels, view: View, rng: np.random.Generator) -> Crop:
        height, width, _ = image.shape
        box = random_box(width, height, scale=view.scale, ratio=self.config.ratio, rng=rng)
        return Crop(resized_crop(image, box, view.size), view.plans.draw(rng))

    def finish(self, crops: Sequence[Crop]) -> list[npt.NDArray[np.float32]]:
        """Carry out the plans of crops of one size and normalise them: float32 ``[C, size, size]`` each."""
        config = self.config
        if config.channels != 3:
            return [multichannel.finish(*crop, config.blur_kernel, config.mean, config.std) for crop in crops]
        if not crops:
            return []
        pixels = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
        plan = PhotometricPlan.of(crop.plan for crop in crops)
        return list(photometric(pixels, plan, mean=config.mean, std=config.std).numpy())
