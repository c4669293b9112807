"""KoLeo and nearest neighbours: values, gradients, degenerate rows, precision, several processes, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dinov2_kernels.koleo import koleo_loss, nearest_neighbors


def by_hand(x: Tensor, eps: float = 1e-8) -> Tensor:
    """KoLeo row by row, by squared distances: another route to the neighbour and to the distance."""
    unit = x / x.norm(dim=1, keepdim=True)
    total = x.new_zeros(())
    for i in range(len(unit)):
        others = torch.cat([unit[:i], unit[i + 1 :]])
        nearest = others[(unit[i] - others).square().sum(dim=1).argmin()]
        total = total - torch.log((unit[i] - nearest + eps).norm() + eps)
    return total / len(unit)


def random_rows(B: int, D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(B * D)).to(dtype)


def test_golden_values() -> None:
    x = torch.sin(1.7 * torch.arange(48, dtype=torch.float64) + 0.3).float().view(6, 8)
    assert koleo_loss(x).item() == pytest.approx(0.055158, abs=1e-6)
    assert koleo_loss(torch.ones(1, 1)).item() == pytest.approx(17.7275, abs=1e-4)
    assert koleo_loss(torch.eye(2)).item() == pytest.approx(-math.log(2) / 2, abs=1e-6)


@pytest.mark.parametrize(("B", "D"), [(2, 1), (2, 3), (7, 5), (33, 64), (128, 17)])
def test_equals_the_row_by_row_formula(B: int, D: int) -> None:
    x = random_rows(B, D).requires_grad_()
    y = x.detach().clone().requires_grad_()
    loss, expected = koleo_loss(x), by_hand(y)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=1e-9)


def test_gradient_is_the_derivative() -> None:
    assert torch.autograd.gradcheck(koleo_loss, random_rows(6, 4).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_rows_and_zero_rows_are_finite(dtype: torch.dtype) -> None:
    x = random_rows(8, 16, dtype)
    x[3] = x[0]
    x[5] = 0
    x[6] = 0
    x.requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("D", [1, 384])
def test_a_single_row_gives_a_constant_without_gradient(D: int) -> None:
    x = random_rows(1, D, torch.float32).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8 * (math.sqrt(D) + 1)), rel=1e-6)
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_opposite_rows_are_neighbours_but_never_themselves() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    index, cosine = nearest_neighbors(x)
    assert index.tolist() == [[1], [0]]
    assert cosine.tolist() == [[-1.0], [-1.0]]
    assert koleo_loss(x).item() == pytest.approx(-math.log(2), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rows_are_compared_in_float32(dtype: torch.dtype) -> None:
    x = random_rows(32, 24, dtype)
    torch.testing.assert_close(koleo_loss(x).double(), by_hand(x.double()), atol=1e-5, rtol=1e-5)


def test_autocast_changes_nothing() -> None:
    x = random_rows(32, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside, (index, cosine) = koleo_loss(x), nearest_neighbors(x, 3)
    assert torch.equal(inside, koleo_loss(x))
    assert torch.equal(index, nearest_neighbors(x, 3)[0])
    assert torch.equal(cosine, nearest_neighbors(x, 3)[1])


def test_compiles_without_a_graph_break() -> None:
    x = random_rows(9, 5, torch.float32)
    compiled = torch.compile(koleo_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), koleo_loss(x))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_neighbours_come_nearest_first(k: int) -> None:
    x = random_rows(7, 4)
    index, cosine = nearest_neighbors(x, k)
    unit = x / x.norm(dim=1, keepdim=True)
    for i in range(7):
        ranked = sorted((j for j in range(7) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        assert index[i].tolist() == ranked[:k]
        torch.testing.assert_close(cosine[i], torch.stack([unit[i] @ unit[j] for j in ranked[:k]]))


def _two_processes(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = random_rows(10, 4).requires_grad_()
    mine = whole.detach()[rank * 5 : rank * 5 + 5].clone().requires_grad_()
    loss = koleo_loss(mine, group=dist.group.WORLD)
    loss.backward()
    mean = loss.detach() / 2
    dist.all_reduce(mean)
    expected = koleo_loss(whole)
    expected.backward()
    torch.testing.assert_close(mean, expected.detach(), atol=1e-12, rtol=1e-12)
    assert whole.grad is not None
    # Data-parallel training averages the processes' gradients, which is where this 2 goes.
    torch.testing.assert_close(mine.grad, 2 * whole.grad[rank * 5 : rank * 5 + 5], atol=1e-12, rtol=1e-12)
    index, cosine = nearest_neighbors(mine.detach(), 2, group=dist.group.WORLD)
    global_index, global_cosine = nearest_neighbors(whole.detach(), 2)
    assert torch.equal(index, global_index[rank * 5 : rank * 5 + 5])
    torch.testing.assert_close(cosine, global_cosine[rank * 5 : rank * 5 + 5])
    dist.destroy_process_group()


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    mp.spawn(_two_processes, args=(f"{tmp_path}/store",), nprocs=2)


@pytest.mark.parametrize("x", [torch.randn(3), torch.randn(0, 4), torch.randn(2, 3, 4)])
def test_wrong_shapes_are_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, D\] with B >= 1, got"):
        koleo_loss(x)


def test_wrong_values_are_named() -> None:
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        koleo_loss(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps: expected a number above 0, got 0"):
        koleo_loss(torch.ones(2, 2), eps=0)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k: expected 1 to 3 neighbours of 4 rows, got {k}"):
            nearest_neighbors(torch.randn(4, 2), k)
