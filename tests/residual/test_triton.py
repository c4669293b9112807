"""The Triton kernels against the reference in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov2_kernels import PackedLayout, stochastic_depth, use_backend
from dinov2_kernels._backend import Backend
from dinov2_kernels.residual import reference, triton_kernel
from tests.residual.cases import (
    CASES,
    DRAWS,
    DTYPES,
    Case,
    assert_draws_match_reference,
    assert_matches_reference,
    operators_of,
)
from tests.triton_interpreter import exact_bfloat16, ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
]

operators = operators_of(triton_kernel)

# All cases take float32 in the arithmetic of a GPU, below; here they take the dtypes by turns. Wide rows differ from
# narrow ones in nothing but shapes.
NARROW = [case for case in CASES if case.C <= 100 or case.magnitude > 1]
VALUES = [(case, dtype) for n, case in enumerate(NARROW) for m, dtype in enumerate(DTYPES) if (n + m) % 3 == 0]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_bfloat16(monkeypatch)


@pytest.mark.parametrize(("case", "dtype"), VALUES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(operators, case, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_in_the_arithmetic_of_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_matches_reference(operators, case, torch.float32)


@pytest.mark.parametrize("case", [Case(((16, 9), (11, 7)), 384), Case(((60, 3),), 90, drop_rate=0.0)], ids=str)
def test_values_where_programs_work_on_many_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "num_multiprocessors", lambda device: 1)
    assert_matches_reference(operators, case, torch.float32)


def test_a_weight_near_zero_beside_rows_that_are_not_there() -> None:
    """Where rows do not fill a tile, its rest would recover (0 - bias) / weight, which is infinite here."""
    t, C = 3, 8
    assert t % triton_kernel._shape_of_rows(C, torch.float32)["ROWS"]
    weight, bias = torch.full([C], 1e-39), torch.ones(C)
    x = torch.randn(t, C)
    h, mean, rstd = reference.residual_gather_norm(x, None, weight, bias, 1e-6, torch.float32)
    of_norm = (None, h, None, mean, rstd, weight, bias)
    actual = triton_kernel.residual_gather_norm_backward(x, x, *of_norm)
    torch.testing.assert_close(actual, reference.residual_gather_norm_backward(x, x, *of_norm))


def test_a_row_is_cut_into_few_pieces() -> None:
    for C in range(1, 3000):
        width, pieces = triton_kernel._cut(C)
        assert pieces <= 5
        assert (pieces - 1) * width < C <= pieces * width
        assert pieces * width == C or C not in (384, 768, 1024, 1280, 1536)


@pytest.mark.parametrize(("runs", "rates"), DRAWS, ids=str)
def test_values_of_several_draws(runs: tuple[tuple[int, int], ...], rates: tuple[float, ...]) -> None:
    assert_draws_match_reference(operators, runs, rates)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "kept"), [(1, 1), (7, 3), (300, 299), (300, 300), (2500, 1250)])
def test_kept_rows_of_equal_keys(count: int, kept: int, dtype: torch.dtype) -> None:
    """Keys that few numbers share: the threshold lies among equal ones."""
    keys = (torch.rand(1, count + 5, generator=torch.Generator().manual_seed(count)) * 4).floor().div(4).to(dtype)
    arguments = keys, [count, 3, 0, 4, 5, 0], [kept, 0, 2]
    for result, expected in zip(
        triton_kernel.residual_kept_rows(*arguments), reference.residual_kept_rows(*arguments), strict=True
    ):
        assert torch.equal(result, expected)


def test_mixed_dtypes_of_autocast() -> None:
    """Tokens in float32, the branch in bfloat16, and weights that are narrower than the sums."""
    generator = torch.Generator().manual_seed(0)
    layout = (6, 3, 4, 2)
    rows, position = reference.residual_kept_rows(torch.rand(1, 10, generator=generator), layout, (4, 2))
    t, T, C = len(rows), len(position), 100
    x, grad_x = torch.randn(2, T, C, generator=generator)
    residual, grad_h = torch.randn(2, t, C, generator=generator).to(torch.bfloat16)
    weight, bias, gamma = torch.randn(3, C, generator=generator).to(torch.float16)
    weight[::3] = 0
    scale = torch.rand(t, generator=generator)

    def run(module: object) -> list[torch.Tensor]:
        ops = operators_of(module)
        h, mean, rstd = ops.gather_norm(x, rows, weight, bias, 1e-6, torch.bfloat16)
        of_x = ops.gather_norm_backward(grad_h, grad_x, x, None, rows, mean, rstd, weight, bias)
        of_h = ops.gather_norm_backward(grad_h, grad_x, None, h, rows, mean, rstd, weight, bias)
        y = x.clone()
        ops.scatter_(y, residual, rows, scale, gamma, bias)
        of_y = ops.scatter_backward(grad_x, residual, rows, scale, gamma, bias, torch.bfloat16)
        return [h, mean, rstd, *of_x, *of_h, y, ops.scatter(x, residual, position, scale, gamma, bias), *of_y]

    for result, expected in zip(run(triton_kernel), run(reference), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_whole_residual_connection(inplace: bool) -> None:
    """Forward and backward of what users call, with Triton behind every operator."""
    layout = PackedLayout([(5, 3), (7, 2)])
    norm = nn.LayerNorm(24).double()
    x, gamma = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((29, 24), (24,)))

    def run(backend: Backend) -> list[torch.Tensor]:
        with use_backend(backend):
            y = stochastic_depth(
                x * 1,
                layout,
                lambda h, _: h.tanh(),
                drop_rate=0.4,
                gamma=gamma,
                norm=norm,
                generator=torch.Generator().manual_seed(0),
                inplace=inplace,
            )
            return [y, *torch.autograd.grad(y.square().sum(), (x, gamma, norm.weight, norm.bias))]

    for result, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(result, expected)
