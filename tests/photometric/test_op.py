"""The photometric augmentation as users call it: the meaning of each step, PyTorch's machinery, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_kernels import PhotometricPlan, photometric
from dinov2_kernels.photometric import ImagePlan, Jitter
from tests.photometric.cases import MEAN, SMALL, STD, Case, on_the_side_of, random_plans

RANDOM = Case(9, 12, tuple(random_plans(5)), "random")


def levels(images: Tensor, **steps: Any) -> Tensor:
    """What an ImagePlan makes of images [N, H, W, 3], as levels [N, H, W, 3]."""
    plan = PhotometricPlan.of([ImagePlan(**steps)] * len(images))
    return photometric(images, plan, mean=[0.0] * 3, std=[1 / 255] * 3).permute(0, 2, 3, 1)


def pixels(*colours: tuple[int, int, int]) -> Tensor:
    """One row of pixels, [1, 1, W, 3]."""
    return torch.tensor(colours, dtype=torch.uint8)[None, None]


def assert_pixels(result: Tensor, *colours: tuple[float, float, float]) -> None:
    torch.testing.assert_close(result[0, 0], torch.tensor(colours, dtype=torch.float32), rtol=0, atol=1e-3)


def test_flip() -> None:
    assert_pixels(levels(pixels((1, 2, 3), (4, 5, 6), (7, 8, 9)), flip=True), (7, 8, 9), (4, 5, 6), (1, 2, 3))


def test_brightness_is_clipped() -> None:
    result = levels(pixels((10, 200, 30)), jitters=((Jitter.BRIGHTNESS, 1.5),))
    assert_pixels(result, (15, 255, 45))


def test_contrast_is_about_the_mean_luma() -> None:
    result = levels(pixels((0, 0, 0), (200, 200, 200)), jitters=((Jitter.CONTRAST, 0.5),))
    assert_pixels(result, (50, 50, 50), (150, 150, 150))


def test_contrast_sees_the_steps_before_it() -> None:
    twice = (Jitter.BRIGHTNESS, 2.0), (Jitter.CONTRAST, 0.5)
    result = levels(pixels((0, 0, 0), (200, 200, 200)), jitters=twice)
    assert_pixels(result, (63.75, 63.75, 63.75), (191.25, 191.25, 191.25))  # 200 was clipped to 255 before the mean
    result = levels(pixels((0, 0, 0), (200, 200, 200)), jitters=twice[::-1])
    assert_pixels(result, (100, 100, 100), (255, 255, 255))


def test_saturation_moves_colours_away_from_their_luma() -> None:
    luma = 0.299 * 100 + 0.587 * 50 + 0.114 * 200
    expected = tuple(luma + 0.5 * (level - luma) for level in (100, 50, 200))
    assert_pixels(levels(pixels((100, 50, 200)), jitters=((Jitter.SATURATION, 0.5),)), expected)
    assert_pixels(levels(pixels((100, 50, 200)), grayscale=True), (luma, luma, luma))


def test_hue_turns_red_to_green_to_blue() -> None:
    primaries = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for thirds in range(-4, 5):
        result = levels(pixels(*primaries), jitters=((Jitter.HUE, thirds / 3),))
        assert_pixels(result, *(primaries[(i + thirds) % 3] for i in range(3)))
    assert_pixels(levels(pixels((200, 50, 50)), jitters=((Jitter.HUE, 1 / 6),)), (200, 200, 50))
    assert_pixels(levels(pixels((77, 77, 77)), jitters=((Jitter.HUE, 0.3),)), (77, 77, 77))


def test_blur_keeps_constants_and_spreads_a_point() -> None:
    image = torch.zeros(1, 21, 21, 3, dtype=torch.uint8)
    image[0, 10, 10] = 255
    result = levels(image, blur_sigma=1.5)[0, :, :, 0]
    offsets = torch.arange(21) - 10
    bell = torch.where(offsets.abs() <= 4, torch.exp(-0.5 * (offsets / 1.5) ** 2), 0)
    torch.testing.assert_close(result, 255 * torch.outer(bell, bell) / bell.sum() ** 2)
    constant = torch.full((1, 3, 6, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(levels(constant, blur_sigma=1.5), constant.float())


def test_solarisation_inverts_from_the_threshold_on() -> None:
    result = levels(pixels((127, 128, 129), (0, 255, 10)), solarize_threshold=128)
    assert_pixels(result, (127, 127, 126), (0, 0, 10))


def test_a_level_that_rounding_puts_across_the_threshold_is_compared_with_its_mirror_image() -> None:
    def normalised(level: float) -> Tensor:
        mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
        return (level / 255 - mean) / std

    below, inverted = normalised(117.29999), normalised(255 - 117.30001)
    torch.testing.assert_close(on_the_side_of(below, inverted, 117.3), below, rtol=0, atol=1e-6)
    torch.testing.assert_close(on_the_side_of(inverted, below, 117.3), inverted, rtol=0, atol=1e-6)
    for exact, result, threshold in (
        (normalised(117.2), normalised(255 - 117.2), 117.3),  # no rounding is as large
        (below, below + 0.1, 117.3),
        (normalised(116.99999), normalised(255 - 117.00001), 117.0),
    ):
        assert torch.equal(on_the_side_of(exact, result, threshold), result)


def test_normalisation() -> None:
    image = pixels((0, 51, 255))
    result = photometric(image, PhotometricPlan.of([ImagePlan()]), mean=MEAN, std=STD)
    expected = (torch.tensor([0.0, 0.2, 1.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(result[0, :, 0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*SMALL[:4], RANDOM], ids=str)
def test_opcheck(case: Case, dtype: torch.dtype) -> None:
    images, plan = case.tensors()
    torch.library.opcheck(torch.ops.dinov2_kernels.photometric.default, (images, plan, MEAN, STD, dtype))


def test_compiles_into_one_graph() -> None:
    images, table = RANDOM.tensors()

    def function(images: Tensor, plan: PhotometricPlan) -> Tensor:
        return photometric(images, plan, mean=MEAN, std=STD, dtype=torch.bfloat16).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plan = PhotometricPlan(table)
    torch.testing.assert_close(compiled(images, plan), function(images, plan), rtol=0, atol=0)


def test_fake_tensors() -> None:
    images = torch.empty(3, 5, 7, 3, dtype=torch.uint8, device="meta")
    plan = PhotometricPlan(torch.empty(3, 12, device="meta"))
    result = photometric(images, plan, mean=MEAN, std=STD, dtype=torch.float16)
    assert (result.shape, result.dtype, result.device.type) == ((3, 3, 5, 7), torch.float16, "meta")


def test_strided_images_and_plans() -> None:
    images, table = RANDOM.tensors()
    expected = photometric(images, PhotometricPlan(table), mean=MEAN, std=STD)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.zeros(len(table), 20).narrow(1, 3, 12).copy_(table)
    assert torch.equal(photometric(planar, PhotometricPlan(wide), mean=MEAN, std=STD), expected)


def test_arguments_are_left_alone() -> None:
    images, table = RANDOM.tensors()
    before = images.clone(), table.clone()
    photometric(images, PhotometricPlan(table), mean=MEAN, std=STD)
    assert torch.equal(images, before[0])
    assert torch.equal(table, before[1])


IMAGES, PLAN = torch.zeros(2, 4, 5, 3, dtype=torch.uint8), PhotometricPlan.of([ImagePlan()] * 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: photometric(IMAGES.float(), PLAN, mean=MEAN, std=STD), TypeError, "images: expected torch.uint8"),
        (
            lambda: photometric(IMAGES.movedim(3, 1), PLAN, mean=MEAN, std=STD),
            ValueError,
            r"images: expected shape \[N, H, W, 3\], got \[2, 3, 4, 5\]",
        ),
        (
            lambda: photometric(IMAGES[:1], PLAN, mean=MEAN, std=STD),
            ValueError,
            "plan: expected a plan of 1 images, got one of 2",
        ),
        (
            lambda: photometric(IMAGES, PLAN.to("meta"), mean=MEAN, std=STD),
            ValueError,
            "plan: expected a table on the device of images, cpu, got meta",
        ),
        (lambda: photometric(IMAGES, PLAN, mean=[0.5], std=STD), ValueError, r"mean: expected three numbers, got \[0"),
        (lambda: photometric(IMAGES, PLAN, mean=MEAN, std=[1, 0, 1]), ValueError, "std: expected three numbers above"),
        (
            lambda: photometric(IMAGES, PLAN, mean=MEAN, std=STD, dtype=torch.float64),
            TypeError,
            "dtype: expected float32, bfloat16 or float16, got torch.float64",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
