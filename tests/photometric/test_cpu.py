"""The native CPU operator: every target this processor runs, rows around the width of its vectors, threads."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import _library
from tests.cpu_targets import OTHER_TARGETS, run_value_tests
from tests.photometric.cases import (
    DTYPES,
    EXTREMES,
    MEAN,
    ORDERS,
    SMALL,
    STD,
    Case,
    assert_matches_reference,
    random_plans,
)

native = torch.ops.dinov2_kernels.photometric
SHAPES = (
    *(Case(4, W, tuple(random_plans(6)), "random") for W in (15, 16, 17, 31, 32, 33, 48, 49)),
    *(Case(H, 6, tuple(random_plans(6)), "random") for H in (4, 5, 8, 9, 10, 19)),  # around the window of the blur
    Case(24, 29, tuple(ORDERS), "orders"),
    Case(21, 34, tuple(EXTREMES), "extremes"),
    Case(96, 98, tuple(random_plans(20)), "random"),
    Case(224, 224, tuple(random_plans(6)), "random"),
    Case(518, 517, tuple(random_plans(3)), "random"),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert _library.OPERATORS["photometric"].has_native("cpu")


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


def test_values_are_the_same_for_every_number_of_threads_and_in_any_batch() -> None:
    images, plan = Case(70, 83, tuple(random_plans(13)), "random").tensors()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native(images, plan, MEAN, STD, torch.float32))
    finally:
        torch.set_num_threads(threads)
    alone = [native(images[n : n + 1], plan[n : n + 1], MEAN, STD, torch.float32) for n in range(13)]
    for result in (*results[1:], torch.cat(alone)):
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)
