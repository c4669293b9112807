"""The native CPU operator: every target this processor runs, values in the tails, threads."""

from __future__ import annotations

import mpmath
import pytest
import torch

from dinov2_kernels import _library
from tests.cpu_targets import OTHER_TARGETS, run_value_tests
from tests.gelu.cases import CASES, DTYPES, Case, assert_matches_reference, list_results

native = torch.ops.dinov2_kernels.gelu_backward_
SHAPES = (
    Case((16, 64)),  # whole vectors of every target
    Case((64, 15)),  # fewer columns than lanes
    Case((2, 3, 5, 17)),
    Case((300, 257)),  # rows of several threads
    Case((4, 1000), offset=3),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert _library.OPERATORS["gelu_backward_"].has_native("cpu")


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_relative_to_each_result(dtype: torch.dtype) -> None:
    """Every result on its own scale, far into the tails, where 1 + erf(z) would be 0: beside mpmath, to 50 digits.

    z^2 / 2 is rounded before exp takes it, which costs the tails z^2 / 2 units in the last place.
    """
    z = torch.cat([torch.linspace(-12, 12, 769), torch.tensor([0.0, 1e-30, -1e-30, 1e-6, -1e-6])]).to(dtype)
    h, dz, _ = list_results(native, torch.ones_like(z), z, False)
    eps = torch.finfo(dtype).eps
    with mpmath.workdps(50):
        for x, value, slope in zip(z.tolist(), h.tolist(), dz.tolist(), strict=True):
            P, p = mpmath.ncdf(x), mpmath.npdf(x)
            allowed = (4 + x * x / 2) * eps
            assert abs(value - x * P) <= allowed * abs(x) * P + 1e-36
            assert abs(slope - (P + x * p)) <= allowed * (P + abs(x) * p) + 1e-36


def test_values_of_missing_and_infinite_inputs() -> None:
    z = torch.zeros(2, 40)
    z[0, 3], z[0, 4], z[1, 5], z[1, 6] = torch.nan, torch.inf, 1e30, -1e15
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for tanh in (False, True):
            h, dz, dz_sum = list_results(native, torch.ones_like(z, dtype=dtype), z.to(dtype), tanh)
            assert h.isnan().nonzero().tolist() == [[0, 3]]
            assert h[0, 4] == torch.inf
            assert h[1, 5] == z[1, 5].to(dtype)
            assert h[1, 6] == 0
            assert dz[0, 3].isnan()
            assert dz_sum[3].isnan()
            assert dz[1, 6] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case((1000, 500)), Case((3, 70001)), Case((50000, 3), tanh=True)], ids=str)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(list_results(native, *case.tensors(dtype), case.tanh))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)
