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

from dinov2.configuration import Config, Count, CountOr0, PartRange, Range, Rules, Share
from dinov2.data import multichannel
from dinov2.data.cropping import random_box, resized_crop
from dinov2.data.decoding import LEVELS, Pixels
from dinov2_kernels.photometric import ImagePlan, PhotometricDistribution, PhotometricPlan, photometric
from dinov2_kernels.photometric.reference import BLUR_TAPS

# Chance of a blur for the first global, the second global and the local crops. "paper" is what the paper says;
# "released" is what trained the published weights: the reference implementation passes 1 - p in place of p.
BLUR_PROBABILITIES = {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}
# Settings that only RGB images have, with their defaults.
COLOUR = {"saturation": 0.2, "hue": 0.1, "grayscale": 0.2}


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Config, at="data.augmentation"):
    """Random views of an image. The defaults are DINOv2's."""

    global_size: Count = 224
    """The two global crops have sides of this many pixels."""
    local_size: Count = 96
    """The local crops have sides of this many pixels."""
    local_crops: CountOr0 = 8
    """An image has this many local crops."""
    global_scale: PartRange = (0.32, 1.0)
    """A global crop covers a share of the image's area between these."""
    local_scale: PartRange = (0.05, 0.32)
    """A local crop covers a share of the image's area between these."""
    ratio: Range = (3 / 4, 4 / 3)
    """A crop has a ratio of width to height between these before it is resized."""
    flip: Share = 0.5
    """A crop is flipped left to right with this chance."""
    jitter: Share = 0.8
    """Brightness, contrast, saturation and hue of a crop change, in random order, with this chance."""
    brightness: Share = 0.4
    """Brightness is multiplied by a factor between 1 - brightness and 1 + brightness."""
    contrast: Share = 0.4
    """Contrast is multiplied by a factor between 1 - contrast and 1 + contrast."""
    saturation: Share | None = None
    """Saturation is multiplied by a factor between 1 - saturation and 1 + saturation. None is 0.2 for images of three
    channels and 0, the only choice, for others."""
    hue: Share | None = None
    """The hue turns by up to this share of the circle, either way; it is at most 0.5. None is 0.1 for images of three
    channels and 0, the only choice, for others."""
    grayscale: Share | None = None
    """A crop loses all colour with this chance. None is 0.2 for images of three channels and 0, the only choice, for
    others."""
    blur: Literal["released", "paper"] = "released"
    """released blurs the first global crop never, the second with chance 0.9 and local crops with 0.5, as the published
    weights were trained. paper takes 1, 0.1 and 0.5, as the paper says."""
    blur_sigma: Range = (0.1, 2.0)
    """The blur has a standard deviation between these, in pixels."""
    blur_kernel: Count = 9
    """The blur's kernel has this side in pixels. It is odd, and 9 for images of three channels."""
    solarize: Share = 0.2
    """The second global crop is solarised with this chance."""
    solarize_threshold: CountOr0 = 128
    """Solarisation inverts levels from this one on (0 to 255)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """These are subtracted from the channels, on a scale where 1 is level 255 of 8 bits, 65535 of 16 bits, and 1 of
    float32. There is one number for each channel of the images."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """The channels are divided by these after the subtraction."""

    def rules(self) -> Rules:
        """Rules between fields; most depend on the number of channels."""
        yield "mean", bool(self.mean), "one value for each channel"
        is_std = len(self.std) == self.channels and min(self.std) > 0
        yield "std", is_std, f"{self.channels} values above 0, one for each of mean"
        for name in COLOUR:
            is_colour = self.channels == 3 or not getattr(self, name)
            yield name, is_colour, f"0 for the {self.channels} channels of mean, because only RGB has it"
        yield "hue", self.colour("hue") <= 0.5, "a number from 0 to 0.5"
        yield "blur_kernel", self.blur_kernel % 2 == 1, "an odd number"
        is_kernel = self.channels != 3 or self.blur_kernel == BLUR_TAPS
        yield "blur_kernel", is_kernel, f"{BLUR_TAPS} for images of three channels"

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    def colour(self, name: str) -> float:
        """The value of ``saturation``, ``hue`` or ``grayscale``, with None replaced by its default."""
        given: float | None = getattr(self, name)
        if given is not None:
            return given
        return COLOUR[name] if self.channels == 3 else 0.0

    def plans(self, *, blur: float, solarize: float = 0.0) -> PhotometricDistribution:
        """The distribution of plans for crops with these chances of a blur and of solarisation."""
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
    """One kind of crop: its side in pixels, its smallest and largest share of the image's area, and its plans."""

    size: int
    scale: tuple[float, float]
    plans: PhotometricDistribution


class Crop(NamedTuple):
    """A crop as it was cut: pixels ``[size, size, C]`` in the image's dtype, and the plan of what follows."""

    pixels: Pixels
    plan: ImagePlan


class MultiCropAugmentation:
    """Turns an image into two global and ``config.local_crops`` local crops.

    Each crop is cut, resized (antialiased bicubic), flipped, jittered, made grey, blurred, solarised and normalised,
    with random numbers of its own. Images of other than three channels have no saturation, hue or grey. All random
    numbers come from the given generator. 2 x 224 + 8 x 96 pixels from a 500 x 400 RGB image take about 2.2 ms on one
    core, of which :meth:`cut` takes 1.4 ms.
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
            image: uint8 RGB ``[H, W, 3]``, or uint8, uint16 or float32 ``[H, W, C]`` if the configuration has another
                number of channels.
            rng: decides everything that is random.

        Returns:
            Two global crops float32 ``[C, global_size, global_size]`` and the local crops float32
            ``[C, local_size, local_size]``, normalised.

        Raises:
            ValueError: the image has another dtype or shape.
        """
        global_crops, local_crops = self.cut(image, rng)
        return self.finish(global_crops), self.finish(local_crops)

    def cut(self, image: Pixels, rng: np.random.Generator) -> tuple[list[Crop], list[Crop]]:
        """Cut the views of an image and draw their plans for :meth:`finish`. Arguments and errors are as for a call."""
        channels = self.config.channels
        if image.dtype.name not in self._types or image.ndim != 3 or image.shape[2] != channels or image.size == 0:
            raise ValueError(
                f"image: expected {' or '.join(self._types)} [H, W, {channels}], got {image.dtype} {list(image.shape)}"
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
