"""What the tests of every backend of the photometric augmentation share: images, plans, the comparison with float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2_kernels.photometric import ImagePlan, Jitter, PhotometricDistribution, PhotometricPlan, draw_plan, reference
from tests.tolerance import assert_at_most_twice_the_error

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRENGTHS = {Jitter.BRIGHTNESS: 1.3, Jitter.CONTRAST: 0.7, Jitter.SATURATION: 1.2, Jitter.HUE: 0.09}

NEAR_A_THRESHOLD = 1e-3
"""Levels between those whose solarisation float32 decides: some fifty roundings of a level of 255."""

Operator = Callable[[Tensor, Tensor, list[float], list[float], torch.dtype], Tensor]

# Every order of the four jitters, and of those before a contrast: its mean is of what they make of the image.
ORDERS = [
    ImagePlan(jitters=tuple((jitter, STRENGTHS[jitter]) for jitter in order))
    for length in range(5)
    for order in itertools.permutations(STRENGTHS, length)
]

EXTREMES = [
    ImagePlan(),
    ImagePlan(flip=True, grayscale=True),
    *(ImagePlan(jitters=((jitter, 0.0),)) for jitter in STRENGTHS),
    *(ImagePlan(jitters=((jitter, 40.0),)) for jitter in (Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION)),
    *(ImagePlan(jitters=((Jitter.HUE, turn),)) for turn in (-0.5, 0.5, 1 / 3, -2 / 3, 1.0, 17.4, -17.4)),
    ImagePlan(jitters=((Jitter.SATURATION, 12.0), (Jitter.HUE, 0.5), (Jitter.CONTRAST, 30.0))),  # clipped in between
    ImagePlan(jitters=((Jitter.BRIGHTNESS, 3.0), (Jitter.CONTRAST, 0.0)), grayscale=True, blur_sigma=0.7),
    *(ImagePlan(blur_sigma=sigma) for sigma in (1e-3, 0.1, 2.0, 1e3)),
    *(ImagePlan(solarize_threshold=threshold) for threshold in (-1.0, 0.0, 128.0, 255.0, 256.0)),
    ImagePlan(flip=True, blur_sigma=1.1, solarize_threshold=100.3),
]


def random_plans(number: int) -> list[ImagePlan]:
    distribution = PhotometricDistribution(solarize=0.3, solarize_threshold=117.3)
    return draw_plan(distribution, [np.random.default_rng((number, n)) for n in range(number)]).images()


@dataclass(frozen=True)
class Case:
    """Images of H x W pixels, one for each plan: noise, a ramp of grays, one colour, black, white, in turn."""

    H: int
    W: int
    plans: tuple[ImagePlan, ...]
    name: str

    def __str__(self) -> str:
        return f"{len(self.plans)}x{self.H}x{self.W}-{self.name}"

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """uint8 images [N, H, W, 3] and the table of their plan [N, 12]."""
        N, shape = len(self.plans), (self.H, self.W, 3)
        generator = torch.Generator(device).manual_seed(self.H * 1000 + self.W)
        noise = torch.randint(0, 256, (N, *shape), dtype=torch.uint8, device=device, generator=generator)
        ramp = (torch.arange(self.H * self.W, device=device) % 256).to(torch.uint8).view(self.H, self.W, 1)
        ramp = ramp.expand(shape)
        colour = torch.tensor([200, 100, 30], dtype=torch.uint8, device=device).expand(shape)
        others = [ramp, colour, torch.zeros_like(colour), torch.full_like(colour, 255)]
        for n in range(N):
            if n % 2:
                noise[n] = others[n // 2 % len(others)]
        return noise, PhotometricPlan.of(self.plans).table.to(device)


SMALL = (
    Case(5, 7, (), "none"),
    Case(0, 7, (ImagePlan(),), "no-rows"),
    Case(5, 0, (ImagePlan(blur_sigma=1.0),), "no-columns"),
    Case(1, 1, tuple(random_plans(9)), "random"),
    Case(1, 23, tuple(random_plans(7)), "random"),
    Case(19, 2, tuple(random_plans(8)), "random"),
    Case(3, 4, tuple(EXTREMES), "extremes"),
    Case(7, 17, tuple(EXTREMES * 2), "extremes"),  # of noise and of the others
    Case(6, 11, tuple(ORDERS), "orders"),
    Case(37, 131, tuple(random_plans(5)), "random"),
)


@functools.cache
def expected(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """What the reference makes of a case in float32, which it rounds once for 16-bit results, and in float64."""
    images, plan = case.tensors(device)
    plain, exact = (reference.photometric(images, plan, MEAN, STD, dtype) for dtype in (torch.float32, torch.float64))
    return plain, exact


def assert_matches_reference(operator: Operator, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """An implementation with the operator's arguments against the reference in float64, image by image."""
    images, plan = case.tensors(device)
    result = operator(images, plan, MEAN, STD, dtype)
    plain, exact = expected(case, device)
    assert result.dtype == dtype, f"{result.dtype}, expected {dtype}"
    assert result.is_contiguous()
    assert not result.isnan().any(), "NaN, or an element that was never written"
    for n, steps in enumerate(case.plans):
        largest = 3 * float(max([1.0, *(abs(strength) for _, strength in steps.jitters)]))
        floor = 8 * torch.finfo(torch.float32).eps * (1 + largest)
        both = (on_the_side_of(exact[n], x, steps.solarize_threshold) for x in (result[n], plain[n].to(dtype)))
        assert_at_most_twice_the_error(f"image {n}, {steps}", *both, exact[n], floor)


def on_the_side_of(exact: Tensor, result: Tensor, threshold: float) -> Tensor:
    """The result [3, H, W] with the levels mirrored that only rounding put on the other side of the threshold.

    Solarisation jumps there, and of a million levels that a jitter or a blur has made some are as near as that. Where
    the threshold is a whole number, levels may be, too, and both sides are exact.
    """
    if math.isinf(threshold) or threshold == round(threshold):
        return result
    mean, std = (torch.tensor(x, dtype=torch.float64, device=exact.device).view(3, 1, 1) for x in (MEAN, STD))
    level = 255 * (exact * std + mean)
    mirrored = (1 - level / 255 - mean) / std
    is_near = torch.minimum((level - threshold).abs(), (255 - level - threshold).abs()) < NEAR_A_THRESHOLD
    is_mirrored = is_near & ((result - mirrored).abs() < (result - exact).abs())
    return torch.where(is_mirrored, exact + (result - mirrored), result.double())


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: sides that are multiples of 16, and odd ones."""
    from dinov2_kernels.photometric import triton_kernel

    for dtype in DTYPES:
        for side in (224, 98):
            images = torch.empty(64, side, side, 3, dtype=torch.uint8, device="meta")
            plan = torch.empty(64, 12, device="meta")
            yield triton_kernel.photometric(images, plan, MEAN, STD, dtype)
