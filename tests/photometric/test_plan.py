"""Plans: the distribution they are drawn from, their table, and what they share with the augmentation of dinov2."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dinov2.data import AugmentationConfig, MultiCropAugmentation
from dinov2.data.cropping import random_box, resized_crop
from dinov2_kernels import PhotometricDistribution, PhotometricPlan, draw_plan
from dinov2_kernels.photometric import ImagePlan, Jitter

N = 20000
STANDARD_ERRORS = 4.5  # seeds are fixed: what passes once passes always


@pytest.fixture(scope="module")
def drawn() -> list[ImagePlan]:
    distribution = PhotometricDistribution(solarize=0.2)
    return [distribution.draw(np.random.default_rng((7, n))) for n in range(N)]


def assert_frequency(count: int, number: int, chance: float) -> None:
    """`count` of `number` draws, within the bounds of a binomial distribution."""
    standard_error = math.sqrt(number * chance * (1 - chance))
    assert abs(count - number * chance) <= STANDARD_ERRORS * standard_error, f"{count} of {number}, chance {chance}"


def assert_uniform(values: list[float], low: float, high: float) -> None:
    """Range, mean and variance of a uniform distribution, and as many values in each tenth of it."""
    sample = np.array(values)
    assert low <= sample.min()
    assert sample.max() <= high
    width = high - low
    assert abs(sample.mean() - (low + high) / 2) <= STANDARD_ERRORS * width / math.sqrt(12 * len(sample))
    for count in np.histogram(sample, 10, (low, high))[0]:
        assert_frequency(int(count), len(sample), 0.1)


def test_frequency_of_each_step(drawn: list[ImagePlan]) -> None:
    assert_frequency(sum(plan.flip for plan in drawn), N, 0.5)
    assert_frequency(sum(len(plan.jitters) == 4 for plan in drawn), N, 0.8)
    assert_frequency(sum(plan.jitters == () for plan in drawn), N, 0.2)
    assert_frequency(sum(plan.grayscale for plan in drawn), N, 0.2)
    assert_frequency(sum(plan.blur_sigma > 0 for plan in drawn), N, 0.5)
    assert_frequency(sum(plan.solarize_threshold == 128 for plan in drawn), N, 0.2)
    assert_frequency(sum(plan.solarize_threshold == math.inf for plan in drawn), N, 0.8)


def test_steps_are_independent_of_each_other(drawn: list[ImagePlan]) -> None:
    steps: dict[str, tuple[float, Callable[[ImagePlan], bool]]] = {
        "flip": (0.5, lambda plan: plan.flip),
        "jitter": (0.8, lambda plan: plan.jitters != ()),
        "grayscale": (0.2, lambda plan: plan.grayscale),
        "blur": (0.5, lambda plan: plan.blur_sigma > 0),
        "solarize": (0.2, lambda plan: plan.solarize_threshold < math.inf),
    }
    for (p, first), (q, second) in itertools.combinations(steps.values(), 2):
        assert_frequency(sum(first(plan) and second(plan) for plan in drawn), N, p * q)


def test_frequency_of_each_order(drawn: list[ImagePlan]) -> None:
    orders = Counter(tuple(jitter for jitter, _ in plan.jitters) for plan in drawn if plan.jitters)
    assert set(orders) == set(itertools.permutations(set(Jitter) - {Jitter.NONE}))
    for count in orders.values():
        assert_frequency(count, orders.total(), 1 / 24)


def test_strengths_are_uniform(drawn: list[ImagePlan]) -> None:
    ranges = {Jitter.BRIGHTNESS: (0.6, 1.4), Jitter.CONTRAST: (0.6, 1.4), Jitter.SATURATION: (0.8, 1.2)}
    for kind, (low, high) in {**ranges, Jitter.HUE: (-0.1, 0.1)}.items():
        assert_uniform([strength for plan in drawn for jitter, strength in plan.jitters if jitter == kind], low, high)
    assert_uniform([plan.blur_sigma for plan in drawn if plan.blur_sigma > 0], 0.1, 2.0)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_chances_of_zero_and_one(chance: float) -> None:
    distribution = PhotometricDistribution(
        flip=chance, jitter=chance, grayscale=chance, blur=chance, solarize=chance, saturation=0.0, hue=0.0
    )
    for plan in draw_plan(distribution, [np.random.default_rng(n) for n in range(50)]).images():
        kinds = {jitter for jitter, _ in plan.jitters}
        assert kinds == ({Jitter.BRIGHTNESS, Jitter.CONTRAST} if chance else set())
        assert plan.flip == plan.grayscale == (plan.blur_sigma > 0) == (plan.solarize_threshold == 128) == bool(chance)


def test_a_plan_depends_on_nothing_but_its_generator() -> None:
    distribution = PhotometricDistribution(solarize=0.5)
    together = draw_plan(distribution, [np.random.default_rng((3, n)) for n in range(12)])
    again = [draw_plan(distribution, [np.random.default_rng((3, n))]) for n in reversed(range(12))]
    assert torch.equal(together.table, torch.cat([plan.table for plan in reversed(again)]))


def drawn_by_hand(generator: np.random.Generator, blur: float, solarize: float) -> ImagePlan:
    """The order of the draws, which runs that are resumed rely on."""
    flip, jitters = generator.random() < 0.5, []
    if generator.random() < 0.8:
        ranges = [(Jitter.BRIGHTNESS, 0.6, 1.4), (Jitter.CONTRAST, 0.6, 1.4), (Jitter.SATURATION, 0.8, 1.2)]
        ranges.append((Jitter.HUE, -0.1, 0.1))
        for i in generator.permutation(4):
            kind, low, high = ranges[i]
            jitters.append((kind, low + (high - low) * generator.random()))
    grayscale = generator.random() < 0.2
    sigma = 0.1 + (2.0 - 0.1) * generator.random() if generator.random() < blur else 0.0
    threshold = 128 if generator.random() < solarize else math.inf
    return ImagePlan(
        flip=flip, jitters=tuple(jitters), grayscale=grayscale, blur_sigma=sigma, solarize_threshold=threshold
    )


@pytest.mark.parametrize(("blur", "chances"), [("released", (0.0, 0.9, 0.5)), ("paper", (1.0, 0.1, 0.5))])
def test_what_the_augmentation_draws(blur: str, chances: tuple[float, float, float]) -> None:
    """By a generator in the same state: the crops that dinov2 cuts out of an image, and the plan of each."""
    config = AugmentationConfig(global_size=32, local_size=16, local_crops=3, blur=blur)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    first, second, local = chances
    views = [(32, (0.32, 1.0), first, 0.0), (32, (0.32, 1.0), second, 0.2), *[(16, (0.05, 0.32), local, 0.0)] * 3]
    for seed in range(20):
        global_crops, local_crops = MultiCropAugmentation(config).cut(image, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        for (size, scale, *of_plan), crop in zip(views, [*global_crops, *local_crops], strict=True):
            box = random_box(50, 40, scale=scale, ratio=(3 / 4, 4 / 3), rng=generator)
            np.testing.assert_array_equal(crop.pixels, resized_crop(image, box, size))
            assert crop.plan == drawn_by_hand(generator, *of_plan)


def test_table_and_back(drawn: list[ImagePlan]) -> None:
    plans = [ImagePlan(), *drawn[:100], ImagePlan(jitters=((Jitter.HUE, -0.25), (Jitter.CONTRAST, 0.5)))]
    plan = PhotometricPlan.of(plans)
    assert (plan.table.shape, plan.table.dtype, len(plan)) == ((102, 12), torch.float32, 102)
    assert PhotometricPlan.of(plan.images()).table.equal(plan.table)
    assert plan.images()[0] == plans[0]
    assert plan.images()[-1] == plans[-1]
    assert PhotometricPlan.of([]).table.shape == (0, 12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ImagePlan(jitters=((Jitter.HUE, 0.1),) * 2),
            "jitters: expected each of the four jitters at",
        ),
        (lambda: ImagePlan(jitters=((Jitter.NONE, 0.1),)), "jitters: expected each of the four jitters at"),
        (
            lambda: ImagePlan(jitters=((Jitter.CONTRAST, -0.1),)),
            "jitters: expected a finite factor >= 0 for contrast, got -0.1",
        ),
        (lambda: ImagePlan(jitters=((Jitter.HUE, math.inf),)), "jitters: expected a finite turn for hue, got inf"),
        (lambda: ImagePlan(blur_sigma=-1.0), "blur_sigma: expected a finite number >= 0, got -1.0"),
        (lambda: ImagePlan(solarize_threshold=math.nan), "solarize_threshold: expected a number, got nan"),
        (lambda: PhotometricDistribution(flip=1.5), r"flip: expected a chance in \[0, 1\], got 1.5"),
        (lambda: PhotometricDistribution(hue=0.7), r"hue: expected a number in \[0, 0.5\], got 0.7"),
        (lambda: PhotometricDistribution(blur_sigma=(2.0, 1.0)), r"blur_sigma: expected \(low, high\)"),
        (lambda: PhotometricPlan(torch.zeros(3, 11)), r"table: expected shape \[N, 12\], got \[3, 11\]"),
    ],
)
def test_bad_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_table_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"table: expected torch.float32, got torch.float64"):
        PhotometricPlan(torch.zeros(3, 12, dtype=torch.float64))
