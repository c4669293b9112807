"""Random plans with the distributions of DINOv2's augmentation, drawn on the host by NumPy's generators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dinov2_kernels.photometric.plan import ImagePlan, Jitter, PhotometricPlan


@dataclass(frozen=True, kw_only=True)
class PhotometricDistribution:
    """How plans are drawn. The defaults are those of DINOv2's local crops.

    Attributes:
        flip: chance of a left-right flip.
        jitter: chance of a colour jitter: brightness, contrast, saturation and hue, in random order.
        brightness: its factor is uniform in 1 - brightness ... 1 + brightness; 0 leaves this jitter out.
        contrast: the same for contrast.
        saturation: the same for saturation.
        hue: the hue turns by up to this part of the circle, in either direction; 0 leaves this jitter out.
        grayscale: chance of losing all colour.
        blur: chance of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation of the blur, in pixels; uniform in between.
        solarize: chance of solarisation.
        solarize_threshold: solarisation inverts levels (0 to 255) that are at least this one.

    Raises:
        ValueError: a value is not as described.

    Examples:
        >>> flips = PhotometricDistribution(flip=1, jitter=0, grayscale=0, blur=0)
        >>> flips.draw(np.random.default_rng(0))
        ImagePlan(flip=True, jitters=(), grayscale=False, blur_sigma=0.0, solarize_threshold=inf)
    """

    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 128.0

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a chance in [0, 1], got {getattr(self, name)}")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected a number in [0, {most}], got {getattr(self, name)}")
        low, high = self.blur_sigma
        if not 0 < low <= high:
            raise ValueError(f"blur_sigma: expected (low, high) with 0 < low <= high, got {self.blur_sigma}")

    def draw(self, generator: np.random.Generator) -> ImagePlan:
        """Draw the plan of one image. It depends only on the state of the generator.

        The draws and their order are part of the definition, so that a run that resumes draws the same plans again.
        """
        jitters: tuple[tuple[Jitter, float], ...] = ()
        sigma, threshold = 0.0, float("inf")
        flip = generator.random() < self.flip
        if generator.random() < self.jitter:
            ranges = self._jitter_ranges()
            order = generator.permutation(len(ranges))
            jitters = tuple((ranges[i][0], _uniform(generator, *ranges[i][1:])) for i in order)
        grayscale = generator.random() < self.grayscale
        if generator.random() < self.blur:
            sigma = _uniform(generator, *self.blur_sigma)
        if generator.random() < self.solarize:
            threshold = self.solarize_threshold
        return ImagePlan(
            flip=flip, jitters=jitters, grayscale=grayscale, blur_sigma=sigma, solarize_threshold=threshold
        )

    def _jitter_ranges(self) -> list[tuple[Jitter, float, float]]:
        """The jitters in use, with the smallest and the largest strength of each."""
        ranges = (
            (Jitter.BRIGHTNESS, 1 - self.brightness, 1 + self.brightness),
            (Jitter.CONTRAST, 1 - self.contrast, 1 + self.contrast),
            (Jitter.SATURATION, 1 - self.saturation, 1 + self.saturation),
            (Jitter.HUE, -self.hue, self.hue),
        )
        return [(jitter, low, high) for jitter, low, high in ranges if low < high]


def draw_plan(distribution: PhotometricDistribution, generators: Iterable[np.random.Generator]) -> PhotometricPlan:
    """Draw the plan of a batch on the host, one image after the other.

    Args:
        distribution: distribution for every image.
        generators: one for each of the N images. Derive each from a seed and the number of the image in the run: then
            the plan of an image depends neither on the other images nor on where the run started.

    Returns:
        A plan of N images.

    Examples:
        >>> generators = [np.random.default_rng([0, number]) for number in range(3)]
        >>> plan = draw_plan(PhotometricDistribution(blur=1.0), generators)
        >>> plan.table.shape
        torch.Size([3, 12])
        >>> all(image.blur_sigma > 0 for image in plan.images())
        True
    """
    return PhotometricPlan.of(distribution.draw(generator) for generator in generators)


def _uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * generator.random()
