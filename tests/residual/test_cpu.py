"""The native CPU operators: every target this processor runs, values, dtypes, threads, memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dinov2_kernels import _library
from dinov2_kernels.residual import reference
from tests.cpu_targets import OTHER_TARGETS, run_python, run_value_tests
from tests.residual.cases import (
    CASES,
    DRAWS,
    DTYPES,
    OPERATORS,
    Case,
    assert_draws_match_reference,
    assert_matches_reference,
    operators_of,
)
from tests.tolerance import assert_at_most_twice_the_error

native = operators_of(torch.ops.dinov2_kernels)
SHAPES = (
    Case(((40, 50), (3, 257)), 384),  # many chunks of tokens, cut within samples
    Case(((9, 70),), 1537, drop_rate=0.0),
    Case(((3000, 1),), 16, drop_rate=0.7),
    Case(((6, 11),), 7),  # fewer channels than lanes
    Case(((6, 11),), 64, with_weight=False),
    Case(((6, 11),), 67, with_weight=False, with_bias=False, with_gamma=False),
)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[f"residual_{name}"].has_native("cpu") for name in OPERATORS)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(("dtype", "branch_dtype"), list(product(DTYPES, DTYPES)), ids=name_of)
def test_values_of_a_branch_in_another_dtype(dtype: torch.dtype, branch_dtype: torch.dtype) -> None:
    assert_matches_reference(native, Case(((7, 5), (13, 3)), 37), dtype, branch_dtype=branch_dtype)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), list(product(DTYPES, DTYPES)), ids=name_of)
def test_values_of_parameters_in_another_dtype(dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    assert_matches_reference(native, Case(((7, 5), (13, 3)), 37), dtype, parameter_dtype=parameter_dtype)


def test_values_of_rows_that_hardly_vary() -> None:
    """A mean far above the deviation: a variance as the difference of two large numbers would be lost."""
    x = 1e4 + torch.randn(50, 384, generator=torch.Generator().manual_seed(0))
    arguments = (None, None, None, 1e-6)
    results = native.gather_norm(x, *arguments, torch.float32)
    plain = reference.residual_gather_norm(x, *arguments, torch.float32)
    exact = reference.residual_gather_norm(x.double(), *arguments, torch.float64)
    for name, *values in zip(("h", "mean", "rstd"), results, plain, exact, strict=True):
        assert_at_most_twice_the_error(name, *values, floor=0)


def test_values_of_sums_over_many_tokens() -> None:
    """Sums in plain float32 would lose a digit here and fail."""
    grad = torch.rand(60000, 17, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(17)

    def sums(operators: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        g, one = grad.to(dtype), ones.to(dtype)
        statistics = (torch.zeros(60000, dtype=dtype), torch.ones(60000, dtype=dtype))
        _, dweight, dbias = operators.gather_norm_backward(g, g, g, None, None, *statistics, one, one)  # type: ignore[attr-defined]
        _, dgamma, dlast = operators.scatter_backward(g, g, None, None, one, one, dtype)  # type: ignore[attr-defined]
        return dweight, dbias, dgamma, dlast

    results, plain = sums(native, torch.float32), sums(operators_of(reference), torch.float32)
    exact = sums(operators_of(reference), torch.float64)
    for values in zip(results, plain, exact, strict=True):
        assert_at_most_twice_the_error("sum", *values, floor=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_values_of_every_16_bit_number(dtype: torch.dtype) -> None:
    """Loads and stores of 16-bit floats: every number comes back, and a sum is rounded to the nearest, ties to even."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    normal = numbers.isnan() | numbers.isinf() | (numbers.abs() >= torch.finfo(dtype).smallest_normal)
    if dtype == torch.bfloat16:  # the processor's conversion has no subnormal numbers
        numbers = torch.where(normal, numbers, 0)
    x = numbers.view(-1, 64)
    zero = torch.zeros(x.shape)
    assert torch.equal(native.scatter(x, zero, None, None, None, None).nan_to_num(nan=7), x.nan_to_num(nan=7))
    finite = torch.where(x.isfinite(), x, 1)
    other = finite.flip(0).float() * (1 + 2.0**-9)
    expected = reference.residual_scatter(finite, other, None, None, None, None)
    keep = expected.abs() >= torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else expected.isfinite()
    result = native.scatter(finite, other, None, None, None, None)
    assert torch.equal(result[keep], expected[keep])


def test_values_of_recovered_tokens_where_a_weight_is_zero() -> None:
    """The normalised token cannot be recovered from such a channel: its gradient of the weight is 0, not NaN."""
    case = Case(((5, 7),), 19)
    assert case.with_weight
    x, grad = torch.randn(35, 19), torch.randn(35, 19)
    weight, bias = torch.randn(19), torch.randn(19)
    weight[::3] = 0
    h, mean, rstd = native.gather_norm(x, None, weight, bias, 1e-6, torch.float32)
    results = native.gather_norm_backward(grad, grad, None, h, None, mean, rstd, weight, bias)
    expected = reference.residual_gather_norm_backward(grad, grad, None, h, None, mean, rstd, weight, bias)
    assert results[1][::3].eq(0).all()
    torch.testing.assert_close(results, expected)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize(("runs", "rates"), DRAWS, ids=str)
def test_values_of_several_draws(runs: tuple[tuple[int, int], ...], rates: tuple[float, ...]) -> None:
    assert_draws_match_reference(native, runs, rates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_values_of_equal_keys(dtype: torch.dtype) -> None:
    keys = torch.tensor([[3, 1, 1, 2, 1, 0, 0, 0]], dtype=dtype)
    for kept in ([2, 1], [5, 3], [1, 2], [0, 0]):
        expected = reference.residual_kept_rows(keys, [5, 2, 3, 1], kept)
        assert all(map(torch.equal, native.kept_rows(keys, [5, 2, 3, 1], kept), expected))


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    threads = torch.get_num_threads()
    yield 1, 2, 3
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", [SHAPES[0], replace(SHAPES[0], drop_rate=0.0), SHAPES[2]], ids=str)
def test_values_are_the_same_for_every_number_of_threads(
    case: Case, dtype: torch.dtype, thread_counts: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    T, C = case.layout.total_tokens, case.C
    rows = position = None
    if case.drop_rate:
        keys = torch.rand(1, case.layout.num_sequences, generator=generator)
        rows, position = native.kept_rows(keys, case.layout.flat_runs, case.kept)
    t = T if rows is None else len(rows)
    x, grad_x = (torch.randn(T, C, generator=generator).to(dtype) for _ in range(2))
    grad_h = torch.randn(t, C, generator=generator).to(dtype)
    gamma, scale = torch.randn(C, generator=generator), torch.rand(t, generator=generator)

    def run() -> list[Tensor]:
        h, mean, rstd = native.gather_norm(x, rows, gamma, gamma, 1e-6, dtype)
        in_place = x.clone()
        native.scatter_(in_place, h, rows, scale, gamma, gamma)
        return [
            *(h, mean, rstd, in_place),
            *native.gather_norm_backward(grad_h, grad_x, x, None, rows, mean, rstd, gamma, gamma),
            *native.gather_norm_backward(grad_h, grad_x, None, h, rows, mean, rstd, gamma, gamma),
            native.scatter(x, h, position, scale, gamma, gamma),
            *native.scatter_backward(grad_x, h, rows, scale, gamma, gamma, dtype),
        ]

    results = []
    for count in thread_counts:
        torch.set_num_threads(count)
        results.append(run())
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)


PEAK_MEMORY = """
import sys, torch, dinov2_kernels as dk
from pathlib import Path

def memory(name):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

layout, C, inplace = dk.PackedLayout([(64, 257), (256, 50)]), 384, sys.argv[1] == "inplace"
norm, gamma = torch.nn.LayerNorm(C, eps=1e-6), torch.nn.Parameter(torch.ones(C))
x = torch.randn(layout.total_tokens, C, requires_grad=True)
dy = torch.randn(layout.total_tokens, C)
for _ in range(2):  # the first time starts the threads and loads the libraries
    tokens, x.grad = x.mul(1.0) if inplace else x, None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    held = memory("VmRSS")
    y = dk.stochastic_depth(tokens, layout, lambda h, _: h, drop_rate=0.3, gamma=gamma, norm=norm, inplace=inplace)
    y.backward(dy)
    peak = memory("VmHWM") - held
    del tokens, y
print(peak / x.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mode", "most"), [("inplace", 2.45), ("functional", 2.75)])
def test_peak_memory(mode: str, most: float) -> None:
    """In units of x, of which 0.7 are kept: h, its gradient and that of x; not in place, the result instead of h."""
    run = run_python("-c", PEAK_MEMORY, mode, MALLOC_MMAP_THRESHOLD_="65536")  # memory is returned when it is freed
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= most
