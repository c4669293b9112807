"""The Triton kernels on a GPU, reached as users reach them: `make test-gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dinov2_kernels import PackedLayout, stochastic_depth
from dinov2_kernels.residual import num_kept_samples, reference
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(operators, case, dtype, "cuda")


@pytest.mark.parametrize(("runs", "rates"), DRAWS, ids=str)
def test_values_of_several_draws(runs: tuple[tuple[int, int], ...], rates: tuple[float, ...]) -> None:
    assert_draws_match_reference(operators, runs, rates, "cuda")


def test_results_do_not_change_from_run_to_run() -> None:
    layout = PackedLayout(CROPS)
    kept = [num_kept_samples(count, 0.3) for count, _ in CROPS]
    rows, _ = operators.kept_rows(torch.rand(1, layout.num_sequences, device="cuda"), layout.flat_runs, kept)
    x, grad = torch.randn(2, layout.total_tokens, 1024, device="cuda")
    weight, bias, gamma = torch.randn(3, 1024, device="cuda")
    h, mean, rstd = operators.gather_norm(x, rows, weight, bias, 1e-6, torch.bfloat16)

    def run() -> list[Tensor]:
        of_norm = operators.gather_norm_backward(h, grad, None, h, rows, mean, rstd, weight, bias)
        return [*of_norm, *operators.scatter_backward(grad, h, rows, rstd, gamma, bias, torch.bfloat16)]

    first = run()
    for _ in range(10):
        assert all(map(torch.equal, run(), first))


class Connection:
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
def warm_connection() -> Connection:
    connection = Connection()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            connection.step()
    torch.cuda.synchronize()
    return connection


def test_a_cuda_graph_draws_anew_with_every_replay(warm_connection: Connection) -> None:
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
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("warm_connection", "no_synchronisation")
def test_a_warm_call_never_waits_for_the_gpu(warm_connection: Connection) -> None:
    warm_connection.step()


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
    operators.scatter_(x, h, rows, None, None, None)
    assert torch.equal(x[t:], y[t:])
