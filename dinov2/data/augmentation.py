"""Multi-crop augmentation: two large and several small random views of one image, each recoloured on its own.

The recipe is DINOv2's (arXiv 2304.07193, appendix B.3, which takes it from DINO and BYOL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dinov2.data import multichannel
from dinov2.data.config import AugmentationConfig
from dinov2.data.cropping import random_box, resized_crop
from dinov2.data.decoding import LEVELS, Pixels
from dinov2_kernels.photometric import ImagePlan, PhotometricDistribution, PhotometricPlan, photometric

# Chance of a blur for the first global, the second global and the local crops. "paper" is what the paper says;
# "released" is what trained the published weights: the reference implementation passes 1 - p in place of p.
BLUR_PROBABILITIES = {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}


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
