"""The Triton kernels on a GPU, reached as users reach them: `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dinov2_kernels import PackedLayout, stochastic_depth
from dinov2_kernels.residual import Connection, Subset, draw_subsets, num_kept_samples, reference, residual_chain
from tests.pairs import pairs
from tests.residual.cases import (
    CASES,
    DRAWS,
    DTYPES,
    Case,
    assert_draws_match_reference,
    assert_matches_reference,
    operators_of,
)

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

operators = operators_of(torch.ops.dinov2_kernels)
CROPS = ((128, 257), (512, 50))
LARGE = (
    *(Case(CROPS, C) for C in (384, 768, 1024, 1280, 1536, 331)),
    Case(CROPS, 384, drop_rate=0.0),
    Case(((5000, 1), (3000, 2)), 64),
)
WIDTHS = {case.C for case in LARGE if case.C > 384}  # small cases of these widths would be kernels of their own
SMALL = [case for case in CASES if case.C not in WIDTHS]


@pytest.mark.parametrize(("case", "dtype"), pairs(SMALL, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(operators, case, dtype, "cuda")


@pytest.mark.parametrize(("runs", "rates"), DRAWS, ids=str)
def test_values_of_several_draws(runs: tuple[tuple[int, int], ...], rates: tuple[float, ...]) -> None:
    assert_draws_match_reference(operators, runs, rates, "cuda")


def test_results_do_not_change_from_run_to_run() -> None:
    layout = PackedLayout(CROPS)
    kept = [num_kept_samples(count, 0.3) for count, _ in CROPS]
    keys = torch.rand(1, layout.num_sequences, device="cuda")
    rows, position = operators.kept_rows(keys, layout.flat_runs, kept)
    x, grad = torch.randn(2, layout.total_tokens, 1024, device="cuda")
    weight, bias, gamma = torch.randn(3, 1024, device="cuda")
    h, mean, rstd = operators.gather_norm(x, rows, weight, bias, 1e-6, torch.bfloat16)

    def run() -> list[Tensor]:
        of_norm = operators.gather_norm_backward(h, grad, None, h, rows, mean, rstd, weight, bias)
        of_both = operators.scatter_gather_norm_backward(
            *(h, grad, None, h, rows, position, mean, rstd, weight, bias),
            *(h, rows, position, rstd, gamma, bias, torch.bfloat16),
        )
        return [*of_norm, *of_both, *operators.scatter_backward(grad, h, rows, rstd, gamma, bias, torch.bfloat16)]

    first = run()
    for _ in range(10):
        assert all(map(torch.equal, run(), first))


class SingleConnection:
    """A residual connection whose branch does nothing, so that its kept tokens and its values are known."""

    def __init__(self) -> None:
        self.layout = PackedLayout([(40, 7), (90, 3)])
        self.norm = nn.LayerNorm(384, device="cuda")
        self.gamma = torch.full((384,), 0.5, device="cuda", requires_grad=True)
        self.x = torch.randn(self.layout.total_tokens, 384, device="cuda", requires_grad=True)

    def gradients(self, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum(), (self.x, self.gamma, self.norm.weight, self.norm.bias)))

    def step(self) -> list[Tensor]:
        y = stochastic_depth(
            self.x, self.layout, lambda h, _: h, drop_rate=0.4, gamma=self.gamma, norm=self.norm, recompute=True
        )
        return [y, *self.gradients(y)]

    def expected(self, kept: Tensor) -> list[Tensor]:
        scale = [
            count / num_kept_samples(count, 0.4) for count, length in self.layout.runs for _ in range(count * length)
        ]
        residual = torch.tensor(scale, device="cuda")[:, None] * self.gamma * self.norm(self.x)
        y = torch.where(kept[:, None], self.x + residual, self.x)
        return [y, *self.gradients(y)]


@pytest.fixture
def warm_connection() -> SingleConnection:
    connection = SingleConnection()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            connection.step()
    torch.cuda.synchronize()
    return connection


def test_a_cuda_graph_draws_anew_with_every_replay(warm_connection: SingleConnection) -> None:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = warm_connection.step()
    draws = []
    for _ in range(3):
        graph.replay()
        kept = (results[0] != warm_connection.x).any(dim=1)
        draws.append(kept)
        for result, expected in zip(results, warm_connection.expected(kept), strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert (draws[0] != draws[1]).any()
    assert (draws[1] != draws[2]).any()


def test_a_chain_in_a_cuda_graph() -> None:
    """Both draws are made anew with every replay, in one launch, and the results are those of their subsets."""
    layout = PackedLayout([(41, 7), (90, 3)])
    norms = [nn.LayerNorm(384, device="cuda") for _ in range(2)]
    gammas = [torch.full((384,), 0.5, device="cuda", requires_grad=True) for _ in range(2)]
    x = torch.randn(layout.total_tokens, 384, device="cuda", requires_grad=True)
    leaves = [x, *gammas, *(p for norm in norms for p in norm.parameters())]

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.square().sum(), leaves))

    def step() -> tuple[list[Subset], list[Tensor]]:
        subsets = draw_subsets(x, layout, [0.4, 0.2])
        parts = zip(subsets, norms, gammas, strict=True)
        y = residual_chain(x, layout, [Connection(lambda h, _: h.sin(), *of_one) for of_one in parts])
        return subsets, [y, *gradients(y)]

    def expected(subsets: list[Subset]) -> list[Tensor]:
        y = x
        for subset, norm, gamma in zip(subsets, norms, gammas, strict=True):
            y = stochastic_depth(y, layout, lambda h, _: h.sin(), subset=subset, norm=norm, gamma=gamma)
        return [y, *gradients(y)]

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subsets, results = step()
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append([subset.rows.clone() for subset in subsets])
        for result, value in zip(results, expected(subsets), strict=True):
            torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-4)
    for first, second in pairwise(draws):
        assert all((one != other).any() for one, other in zip(first, second, strict=True))


def test_a_capture_without_a_warm_call_says_so() -> None:
    x, layout = torch.zeros(33, 8, device="cuda"), PackedLayout([(11, 3)])  # runs of no other test
    message = "make the same call once before the capture"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        draw_subsets(x, layout, [0.25])


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("warm_connection", "no_synchronisation")
def test_a_warm_call_never_waits_for_the_gpu(warm_connection: SingleConnection) -> None:
    warm_connection.step()


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    count, C = 2800, 1024
    layout = PackedLayout([(count, 800)])
    rows, position = operators.kept_rows(torch.rand(1, count, device="cuda"), layout.flat_runs, [count // 2])
    T, t = len(position), len(rows)
    assert T * C > 2**31
    x = torch.randn(T, C, dtype=torch.bfloat16, device="cuda")
    h, mean, rstd = operators.gather_norm(x, rows, None, None, 1e-6, torch.bfloat16)
    last = rows[-5:].long()
    torch.testing.assert_close(h[-5:], reference.residual_gather_norm(x[last], None, None, None, 1e-6, h.dtype)[0])
    y = operators.scatter(x, h, position, None, None, None)
    torch.testing.assert_close(y[last], x[last] + h[-5:])
    dropped = (position < 0).nonzero().flatten()[-5:]
    assert torch.equal(y[dropped], x[dropped])
    dx = operators.gather_norm_backward(h, x, None, h, rows, mean, rstd, None, None)[0]
    assert torch.equal(dx[dropped], x[dropped])
    expected = reference.residual_gather_norm_backward(
        h[-5:], x[last], None, h[-5:], None, mean[-5:], rstd[-5:], None, None
    )[0]
    torch.testing.assert_close(dx[last], expected)
    dresidual = operators.scatter_backward(x, None, rows, None, None, None, torch.bfloat16)[0]
    assert torch.equal(dresidual[-5:], x[last])
    del y
    y, next_h, *statistics = operators.scatter_gather_norm(
        x, h, position, None, None, None, rows, position, None, None, 1e-6, h.dtype
    )
    torch.testing.assert_close(y[last], x[last] + h[-5:])
    assert torch.equal(y[dropped], x[dropped])
    expected_h = reference.residual_gather_norm(y[last], None, None, None, 1e-6, h.dtype)[0]
    torch.testing.assert_close(next_h[-5:], expected_h)
    of_norm, of_scatter = (None, next_h, rows, position, *statistics, None, None), (rows, position, None, None, None)
    dx, _, _, dresidual, _, _ = operators.scatter_gather_norm_backward(h, x, *of_norm, None, *of_scatter, h.dtype)
    assert torch.equal(dx[dropped], x[dropped])
    assert torch.equal(dresidual[-5:], dx[last])
    del dx, dresidual, next_h
    operators.scatter_(x, h, rows, None, None, None)
    assert torch.equal(x[t:], y[t:])
