"""The native CPU operators: every target this processor runs, values of shared targets and many rows, threads."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import _library
from tests.cpu_targets import TARGETS, run_value_tests
from tests.cross_entropy.cases import CASES, DTYPES, Case, assert_matches_reference

native = torch.ops.dinov2_kernels
SHAPES = (
    Case(3, 2, 64),  # whole vectors of every target
    Case(4, 3, 15),  # fewer columns than lanes
    Case(40, 5, 2048 + 17, shared=True),  # groups of more than 8 students; a tile of columns and a bit
    Case(5000, 37, 11, J=2),
    Case(3, 3, 65537, J=0),
    Case(2, 2, 131071, J=2),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[f"soft_cross_entropy{name}"].has_native("cpu") for name in ("", "_backward"))
    assert _library.OPERATORS["soft_cross_entropy_backward_"].has_native("cpu")


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("teacher", DTYPES[1:], ids=str)
@pytest.mark.parametrize("student", DTYPES[1:], ids=str)
def test_values_of_two_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    assert_matches_reference(native, Case(7, 4, 1000, J=2), student, teacher_dtype=teacher)


def test_values_of_rising_logits() -> None:
    """Maxima that rise from tile to tile: every sum so far is scaled down again and again, sometimes to 0."""
    K = 3 * 2048 + 5
    rising = torch.linspace(-30, 30, K, dtype=torch.float64)
    student, teacher = torch.stack([rising, rising.flip(0)]), torch.stack([rising, rising.flip(0)])
    index = torch.tensor([[0, 1], [1, 1]])
    arguments = (index, None, None, 0.1, 0.07)
    exact = torch.ops.dinov2_kernels.soft_cross_entropy(student, teacher, *arguments)[0]
    targets = torch.softmax(teacher / 0.07, dim=1)[index].sum(dim=1)
    torch.testing.assert_close(exact, -(targets * torch.log_softmax(student / 0.1, dim=1)).sum(dim=1))
    single = torch.ops.dinov2_kernels.soft_cross_entropy(student.float(), teacher.float(), *arguments)[0]
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-4)


def test_values_of_missing_logits() -> None:
    arguments = Case(4, 4, 100, J=0).arguments(torch.float32)
    arguments[0][1, 50] = torch.nan
    arguments[1][2, 7] = torch.nan
    loss, *norms = native.soft_cross_entropy(*arguments)
    assert loss.isnan().tolist() == [False, True, True, False]
    gradient = native.soft_cross_entropy_backward(torch.ones(4), *arguments, *norms)
    assert gradient.isnan().any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(200, 50, 1000, J=2), Case(3, 3, 70001, J=0), Case(5000, 3, 40)], ids=str)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss, *norms = native.soft_cross_entropy(*arguments)
            gradient = native.soft_cross_entropy_backward(torch.ones_like(loss), *arguments, *norms)
            results.append((loss, *norms, gradient))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)
