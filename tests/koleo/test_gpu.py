"""Triton and CUDA C++ on a GPU: `make test-gpu`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dinov2_kernels import koleo_loss, nearest_neighbors
from tests.koleo.cases import (
    CASES,
    DTYPES,
    EPS,
    Case,
    assert_a_nan_is_farthest,
    assert_matches_reference,
    assert_ties_go_to_the_lowest,
    operators_of,
    random_rows,
)
from tests.pairs import pairs

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (
    Case(1031, 384),
    Case(4096, 1024, k=3),
    Case(8200, 384),
    Case(2048, 768, k=2, n_groups=2, world_size=2, rank=1),
)


@pytest.fixture(params=["triton", "native"])
def operators(request: pytest.FixtureRequest) -> SimpleNamespace:
    ops = torch.ops.dinov2_kernels if request.param == "triton" else torch.ops.dinov2_kernels_cuda
    return operators_of(ops)


@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype, operators: SimpleNamespace) -> None:
    assert_matches_reference(operators, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_and_nan(dtype: torch.dtype, operators: SimpleNamespace) -> None:
    assert_ties_go_to_the_lowest(operators, dtype, "cuda")
    assert_a_nan_is_farthest(operators, dtype, "cuda")


def test_results_do_not_change_from_run_to_run(operators: SimpleNamespace) -> None:
    x = random_rows(2000, 384, torch.float32).cuda()
    loss, index = operators.forward(x, 2, 1, 1, 0, EPS)
    dx = operators.backward(torch.ones_like(loss), x, index, 0, EPS)
    for _ in range(10):
        again, same_index = operators.forward(x, 2, 1, 1, 0, EPS)
        assert torch.equal(again, loss)
        assert torch.equal(same_index, index)
        assert torch.equal(operators.backward(torch.ones_like(loss), x, index, 0, EPS), dx)


def test_a_call_never_waits_for_the_gpu() -> None:
    x = torch.randn(64, 384, device="cuda", requires_grad=True)
    koleo_loss(x).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        koleo_loss(x, k=2, n_groups=2).backward()
        nearest_neighbors(x, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays() -> None:
    x = torch.randn(64, 384, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(koleo_loss(x), x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(koleo_loss(x), x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(gradient, torch.autograd.grad(koleo_loss(x), x)[0])


@pytest.mark.large
def test_rows_past_two_to_the_31_elements(operators: SimpleNamespace) -> None:
    rows, D = 1026, 2**21  # of random numbers the last rows are everybody's last candidates
    x = torch.randn(rows, D, device="cuda", dtype=torch.bfloat16)
    x[-1] = x[0]
    index, _ = operators.nearest(x, 1, 1, 1, 0, EPS)
    assert index[0].item() == rows - 1
    assert index[-1].item() == 0
