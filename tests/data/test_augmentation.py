"""Multi-crop augmentation: shapes, chances, the statistics of boxes, and whole views against the same in Pillow."""

import math
import pickle
import sys
from collections import Counter

import numpy as np
import pytest

from dinov2.data import (
    AugmentationConfig,
    BundledPhotographs,
    MultiCropAugmentation,
    augmentation,
    normalize,
)
from dinov2.data.augmentation import BLUR_PROBABILITIES
from dinov2.data.cropping import random_box
from dinov2_kernels.photometric import ImagePlan, Jitter
from tests.photometric import pillow

SMALL = AugmentationConfig(global_size=32, local_size=16, local_crops=3)


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    photographs = BundledPhotographs()
    return photographs[photographs.names.index("coffee")]


def all_views(augment: MultiCropAugmentation, image: np.ndarray, seed: int) -> list[np.ndarray]:
    global_crops, local_crops = augment(image, np.random.default_rng(seed))
    return global_crops + local_crops


def test_shapes_and_types(photograph: np.ndarray) -> None:
    global_crops, local_crops = MultiCropAugmentation(SMALL)(photograph, np.random.default_rng(0))
    assert [crop.shape for crop in global_crops] == [(3, 32, 32)] * 2
    assert [crop.shape for crop in local_crops] == [(3, 16, 16)] * 3
    assert {crop.dtype for crop in global_crops + local_crops} == {np.dtype(np.float32)}


def test_generator_decides_everything(photograph: np.ndarray) -> None:
    augment = MultiCropAugmentation(SMALL)
    first, again, other = (all_views(augment, photograph, seed) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
    assert (first[0] != first[1]).any()


def test_other_processes_can_be_passed_it(photograph: np.ndarray) -> None:
    augment = MultiCropAugmentation(SMALL)
    for a, b in zip(
        *(all_views(one, photograph, 1) for one in (augment, pickle.loads(pickle.dumps(augment)))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_defaults_are_dinov2s() -> None:
    config = AugmentationConfig()
    assert (config.global_size, config.local_size, config.local_crops) == (224, 96, 8)
    assert (config.global_scale, config.local_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (config.jitter, config.brightness, config.contrast) == (0.8, 0.4, 0.4)
    assert [config.colour(name) for name in ("saturation", "hue", "grayscale")] == [0.2, 0.1, 0.2]
    assert (config.solarize, config.flip, config.blur) == (0.2, 0.5, "released")
    assert BLUR_PROBABILITIES == {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5)}


def test_normalize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
    found = normalize(image, mean, std)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.flags.c_contiguous
    assert found.dtype == np.float32


def operations(plan: ImagePlan) -> list[tuple[str, float]]:
    """What a plan does, in its order, and by how much."""
    jitters = [(f"adjust_{jitter.name.lower()}", strength) for jitter, strength in plan.jitters]
    others = [
        ("flip", 1.0, plan.flip),
        ("grayscale", 1.0, plan.grayscale),
        ("gaussian_blur", plan.blur_sigma, plan.blur_sigma > 0),
        ("solarize", plan.solarize_threshold, plan.solarize_threshold < math.inf),
    ]
    return jitters + [(name, strength) for name, strength, is_done in others if is_done]


@pytest.mark.parametrize("blur", ["released", "paper"])
def test_chances_of_each_operation(blur: str) -> None:
    """Counted in the plans, per kind of crop."""
    calls: Counter[tuple[int, str]] = Counter()
    order: Counter[tuple[str, ...]] = Counter()
    parameters: dict[str, list[float]] = {}
    config = AugmentationConfig(global_size=2, local_size=2, local_crops=2, blur=blur)
    augment, image, rng = MultiCropAugmentation(config), np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)
    number = 2000
    for _ in range(number):
        global_crops, local_crops = augment.cut(image, rng)
        for view, crop in enumerate(global_crops + local_crops):
            steps = operations(crop.plan)
            calls.update((min(view, 2), name) for name, _ in steps)
            order[tuple(name for name, _ in steps if name.startswith("adjust"))] += 1
            for name, strength in steps:
                parameters.setdefault(name, []).append(strength)
    chances = dict.fromkeys(("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"), (0.8,) * 3)
    chances |= {"flip": (0.5,) * 3, "grayscale": (0.2,) * 3, "solarize": (0.0, 0.2, 0.0)}
    chances |= {"gaussian_blur": (0.0, 0.9, 0.5) if blur == "released" else (1.0, 0.1, 0.5)}
    for name, of_view in chances.items():
        for kind, chance in enumerate(of_view):
            crops = number * (2 if kind == 2 else 1)
            deviation = math.sqrt(chance * (1 - chance) / crops)
            assert abs(calls[kind, name] / crops - chance) <= 4 * deviation, (name, kind)

    ranges = {
        "adjust_brightness": (0.6, 1.4),
        "adjust_contrast": (0.6, 1.4),
        "adjust_saturation": (0.8, 1.2),
        "adjust_hue": (-0.1, 0.1),
        "gaussian_blur": (0.1, 2.0),
    }
    for name, (low, high) in ranges.items():
        drawn = np.array(parameters[name])
        assert low <= drawn.min() < low + 0.02 * (high - low)
        assert high >= drawn.max() > high - 0.02 * (high - low)
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert set(parameters["solarize"]) == {128}
    del order[()]
    assert len(order) == 24
    assert min(order.values()) > 0.7 * sum(order.values()) / 24


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.32, 1.0)])
def test_boxes_are_uniform_in_area_log_ratio_and_place(scale: tuple[float, float]) -> None:
    rng, side = np.random.default_rng(0), 1000
    boxes = np.array([random_box(side, side, scale=scale, ratio=(3 / 4, 4 / 3), rng=rng) for _ in range(8000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    area, ratio = width * height / side**2, np.log(width / height) / np.log(4 / 3)
    assert (boxes >= 0).all()
    assert (boxes <= side).all()
    inner = area < 0.5  # larger boxes of extreme ratio do not fit and are drawn again
    quartiles = (0.25, 0.5, 0.75)
    low, high = scale[0], min(scale[1], 0.5)
    np.testing.assert_allclose(
        np.quantile(area[inner], quartiles), [low + q * (high - low) for q in quartiles], atol=0.02
    )
    np.testing.assert_allclose(np.quantile(ratio[inner], quartiles), [-0.5, 0, 0.5], atol=0.06)
    for start, size in ((left, width), (top, height)):
        room = side - size > 50
        place = start[room] / (side - size[room])
        np.testing.assert_allclose(np.quantile(place, quartiles), quartiles, atol=0.03)


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 10, (494, 0, 507, 10)), (10, 1000, (0, 494, 10, 507))])
def test_box_of_an_image_too_long_for_the_ratio_is_central(width: int, height: int, box: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    assert random_box(width, height, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), rng=rng) == pytest.approx(box, abs=1)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 50, 3), (3, 2, 3)])
def test_tiny_images(shape: tuple[int, ...]) -> None:
    for crop in all_views(MultiCropAugmentation(SMALL), np.full(shape, 200, np.uint8), seed=0):
        assert crop.std(axis=(1, 2)).max() == pytest.approx(0, abs=1e-6)


def test_views_are_those_of_plain_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers through Pillow's operations: whole views agree within a few levels.

    Pillow's blend rounds brightness, contrast and saturation down, which loses half a level each on average. The
    operator does not round, so these halves are given back before the comparison.
    """
    config = AugmentationConfig(local_crops=2, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
    images, augment = BundledPhotographs(colour_only=True), MultiCropAugmentation(config)

    def by_pillow(crop: augmentation.Crop) -> np.ndarray:
        lost = sum(jitter != Jitter.HUE for jitter, _ in crop.plan.jitters) / 2
        return pillow.recolour(crop.pixels, crop.plan).transpose(2, 0, 1).astype(np.float32) + np.float32(lost)

    ours = [crop for seed in range(20) for crop in all_views(augment, images[seed % len(images)], seed)]
    monkeypatch.setattr(augmentation, "resized_crop", pillow.resized_crop)
    cut = [augment.cut(images[seed % len(images)], np.random.default_rng(seed)) for seed in range(20)]
    pillows = [by_pillow(crop) for views in cut for crops in views for crop in crops]

    assert len(ours) == 20 * 4
    differences = [np.abs(a - b).mean() for a, b in zip(ours, pillows, strict=True)]
    assert np.mean(differences) < 1.0
    assert max(differences) < 4
    assert abs(np.mean([a.mean() - b.mean() for a, b in zip(ours, pillows, strict=True)])) < 0.5  # no drift


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)]
)
def test_image_of_another_kind_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"image: expected uint8 \[H, W, 3\], got (float32|uint8) \[8, 8"):
        MultiCropAugmentation(SMALL)(image, np.random.default_rng(0))


@pytest.mark.parametrize(
    "bad",
    [
        {"blur": "always"},
        {"local_scale": (0.5, 0.1)},
        {"flip": 2.0},
        {"hue": 0.7},
        {"brightness": -0.1},
        {"global_size": 0},
        {"local_crops": -1},
        {"blur_kernel": 4},
        {"blur_kernel": 5},
        {"ratio": (0.0, 1.0)},
    ],
)
def test_config_refuses(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        AugmentationConfig(**bad)


@pytest.mark.parametrize("channels", [3, 5])
def test_nothing_but_the_core_dependencies_is_needed(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    for optional in ("cv2", "skimage", "sklearn", "tensorboard"):
        monkeypatch.setitem(sys.modules, optional, None)  # importing it is an error now
    config = AugmentationConfig(
        global_size=32, local_size=16, local_crops=3, mean=(0.5,) * channels, std=(0.2,) * channels, blur="paper"
    )
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels)).astype(np.uint8)
    assert [crop.shape[0] for crop in all_views(MultiCropAugmentation(config), image, seed=0)] == [channels] * 5
