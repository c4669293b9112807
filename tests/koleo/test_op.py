"""KoLeo and nearest neighbours as users call them: values, gradients, PyTorch's machinery, processes, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_kernels import use_backend
from dinov2_kernels.koleo import koleo_loss, nearest_neighbors
from tests.koleo.cases import EPS, random_rows
from tests.process_group import in_processes


def by_hand(x: Tensor, k: int = 1, eps: float = 1e-8) -> Tensor:
    """KoLeo row by row, by squared distances: another route to the neighbours and to the distance."""
    unit = x / x.norm(dim=1, keepdim=True)
    total = x.new_zeros(())
    for i in range(len(unit)):
        others = torch.cat([unit[:i], unit[i + 1 :]])
        for j in (unit[i] - others).square().sum(dim=1).argsort()[:k]:
            total = total - torch.log((unit[i] - others[j] + eps).norm() + eps)
    return total / len(unit) / k


def test_golden_values() -> None:
    x = torch.sin(1.7 * torch.arange(48, dtype=torch.float64) + 0.3).float().view(6, 8)
    assert koleo_loss(x).item() == pytest.approx(0.055158, abs=1e-6)
    assert koleo_loss(torch.ones(1, 1)).item() == pytest.approx(17.7275, abs=1e-4)
    assert koleo_loss(torch.eye(2)).item() == pytest.approx(-math.log(2) / 2, abs=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("B", "D", "k"), [(2, 1, 1), (2, 3, 1), (7, 5, 1), (7, 5, 6), (33, 64, 1), (33, 64, 3), (128, 17, 1)]
)
def test_equals_the_row_by_row_formula(B: int, D: int, k: int, backend: str) -> None:
    x = random_rows(B, D).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with use_backend(backend):  # type: ignore[arg-type]
        loss = koleo_loss(x, k=k)
        loss.backward()
    expected = by_hand(y, k)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    expected.backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=1e-9)


def published(x: Tensor, k: int = 1, eps: float = 1e-8) -> Tensor:
    """The recipe of DINOv2, and of DINOv3 with k neighbours: autograd through PyTorch's own operators."""
    x = torch.nn.functional.normalize(x, eps=eps, p=2, dim=-1)
    with torch.no_grad():
        neighbors = (x @ x.T).fill_diagonal_(-1).topk(k, dim=1).indices
    pairs = x[:, None].expand(-1, k, -1).flatten(0, 1), x[neighbors].flatten(0, 1)
    return -torch.log(torch.nn.PairwiseDistance(2, eps=eps)(*pairs) + eps).mean()


@pytest.mark.parametrize("k", [1, 4])
def test_equals_the_published_recipe(k: int) -> None:
    x = random_rows(65, 24).requires_grad_()
    loss, expected = koleo_loss(x, k=k), published(x, k)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (loss, expected)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("k", "n_groups"), [(1, 1), (3, 1), (1, 3), (2, 2)])
def test_gradient_is_the_derivative(k: int, n_groups: int) -> None:
    x = random_rows(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: koleo_loss(x, k=k, n_groups=n_groups), x)


@pytest.mark.parametrize(("n_groups", "k"), [(1, 1), (2, 1), (3, 2)])
def test_blocks_are_batches_of_their_own(n_groups: int, k: int) -> None:
    x = random_rows(24, 6).requires_grad_()
    blocks = x.chunk(n_groups)
    loss, expected = koleo_loss(x, k=k, n_groups=n_groups), sum(koleo_loss(block, k=k) for block in blocks)
    torch.testing.assert_close(n_groups * loss, expected)
    gradients = [torch.autograd.grad(y, x)[0] for y in (n_groups * loss, expected)]
    torch.testing.assert_close(*gradients)
    index, cosine = nearest_neighbors(x, k, n_groups=n_groups)
    for i, block in enumerate(blocks):
        own = slice(i * len(block), (i + 1) * len(block))
        block_index, block_cosine = nearest_neighbors(block, k)
        assert torch.equal(index[own], block_index + i * len(block))
        torch.testing.assert_close(cosine[own], block_cosine)


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
    assert x.grad[5:7].eq(0).all()


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


@pytest.mark.parametrize("k", [1, 3, 6])
def test_neighbours_come_nearest_first(k: int) -> None:
    x = random_rows(7, 4)
    index, cosine = nearest_neighbors(x, k)
    unit = x / x.norm(dim=1, keepdim=True)
    for i in range(7):
        ranked = sorted((j for j in range(7) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        assert index[i].tolist() == ranked[:k]
        torch.testing.assert_close(cosine[i], torch.stack([unit[i] @ unit[j] for j in ranked[:k]]))


def test_of_equal_rows_the_first_is_nearest() -> None:
    index, _ = nearest_neighbors(torch.ones(5, 3), 2)
    assert index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_a_row_with_a_nan_is_nobodys_neighbour() -> None:
    x = random_rows(5, 3, torch.float32)
    x[1, 2] = torch.nan
    index, cosine = nearest_neighbors(x)
    assert index[1].item() == 0
    assert not index[[0, 2, 3, 4]].eq(1).any()
    assert cosine.isnan().flatten().tolist() == [False, True, False, False, False]
    assert koleo_loss(x).isnan()


# -------------------------------------------------------------------------------------------------- PyTorch's machinery


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    x = random_rows(32, 24, torch.float32)
    with use_backend(backend):  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            inside, (index, cosine) = koleo_loss(x), nearest_neighbors(x, 3)
        assert torch.equal(inside, koleo_loss(x))
        assert torch.equal(index, nearest_neighbors(x, 3)[0])
        assert torch.equal(cosine, nearest_neighbors(x, 3)[1])


def test_compiles_without_a_graph_break() -> None:
    x = random_rows(10, 5, torch.float32).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return koleo_loss(2 * x, k=2, n_groups=2).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, function)))


def test_compiled_neighbours() -> None:
    x = random_rows(10, 5, torch.float32)
    compiled = torch.compile(nearest_neighbors, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 3), nearest_neighbors(x, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = random_rows(12, 5, dtype)
    ops = torch.ops.dinov2_kernels
    for name in ("koleo_nearest", "koleo_forward"):
        torch.library.opcheck(getattr(ops, name).default, (x, 2, 3, 2, 1, EPS))
    index = torch.cat([ops.koleo_forward(x, 2, 3, 2, rank, EPS)[1] for rank in range(2)])
    torch.library.opcheck(ops.koleo_backward.default, (torch.randn(2), x, index, 1, EPS))


def test_strided_rows() -> None:
    x = random_rows(9, 6).T.contiguous().T.requires_grad_()
    loss, expected = koleo_loss(x), koleo_loss(x.contiguous())
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (loss, expected)))
    assert torch.equal(nearest_neighbors(x)[0], nearest_neighbors(x.contiguous())[0])


def test_the_gradient_follows_its_scale() -> None:
    x = random_rows(9, 6).requires_grad_()
    plain, scaled = (torch.autograd.grad(scale * koleo_loss(x), x)[0] for scale in (1, -3))
    torch.testing.assert_close(scaled, -3 * plain)
    assert torch.autograd.grad(0 * koleo_loss(x), x)[0].eq(0).all()


# ---------------------------------------------------------------------------------------------------- several processes


def _one_of(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    B = 6
    own = slice(rank * B, (rank + 1) * B)
    for k, n_groups in ((1, 1), (2, 2)):
        rows = random_rows(world_size * B, 4)
        # One process has block 0 of every process first, then block 1.
        order = torch.arange(len(rows)).unflatten(0, (world_size, n_groups, -1)).transpose(0, 1).flatten()
        place = order.argsort()
        whole = rows[order].requires_grad_()
        mine = rows[own].clone().requires_grad_()
        loss = koleo_loss(mine, k=k, n_groups=n_groups, group=group)
        loss.backward()
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        expected = koleo_loss(whole, k=k, n_groups=n_groups)
        expected.backward()
        torch.testing.assert_close(mean, expected.detach(), atol=1e-12, rtol=1e-12)
        assert whole.grad is not None
        # Data-parallel training averages the processes' gradients, which is where the number of processes goes.
        torch.testing.assert_close(mine.grad, world_size * whole.grad[place][own], atol=1e-12, rtol=1e-12)
        index, cosine = nearest_neighbors(mine.detach(), 2, n_groups=n_groups, group=group)
        whole_index, whole_cosine = nearest_neighbors(whole.detach(), 2, n_groups=n_groups)
        assert torch.equal(index, order[whole_index][place][own])
        torch.testing.assert_close(cosine, whole_cosine[place][own])
    _gradients_of_different_scales(rank, world_size)
    if world_size > 1:
        first = dist.new_group([0])
        if rank == 0:
            assert torch.equal(koleo_loss(mine, group=first), koleo_loss(mine))
        else:
            with pytest.raises(ValueError, match="group: expected a process group to which this process belongs"):
                koleo_loss(mine, group=first)


def _gradients_of_different_scales(rank: int, world_size: int) -> None:
    """The sum of the processes' losses, each times a factor of its own, has the gradient that every process gets."""
    rows = random_rows(world_size * 5, 3)
    mine = rows[rank * 5 : rank * 5 + 5].clone().requires_grad_()
    ((rank + 1) * koleo_loss(mine, group=dist.group.WORLD)).backward()
    whole = rows.clone().requires_grad_()
    unit = torch.nn.functional.normalize(whole, dim=1)
    index, _ = nearest_neighbors(whole)
    terms = torch.log((unit - unit[index[:, 0]] + EPS).norm(dim=1) + EPS)
    factor = torch.arange(1, world_size + 1).repeat_interleave(5)
    (-(factor * terms).sum() / 5).backward()
    assert whole.grad is not None
    torch.testing.assert_close(mine.grad, whole.grad[rank * 5 : rank * 5 + 5], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_are_one_batch(world_size: int, tmp_path: Path) -> None:
    in_processes(world_size, tmp_path, _one_of)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("function", [koleo_loss, nearest_neighbors])
@pytest.mark.parametrize("x", [torch.randn(3), torch.randn(0, 4), torch.randn(2, 3, 4)])
def test_wrong_shapes_are_named(x: Tensor, function: type) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, D\] with B >= 1, got"):
        function(x)


def test_wrong_values_are_named() -> None:
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        koleo_loss(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="eps: expected a number above 0, got 0"):
        koleo_loss(torch.ones(2, 2), eps=0)
    for n_groups in (0, -2, 3):
        with pytest.raises(ValueError, match=f"n_groups: expected a divisor of the 4 rows, got {n_groups}"):
            koleo_loss(torch.randn(4, 2), n_groups=n_groups)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k: expected 1 to 3 neighbours of 4 rows, got {k}"):
            nearest_neighbors(torch.randn(4, 2), k)
        with pytest.raises(ValueError, match=f"k: expected 1 to 3 neighbours of 4 rows, got {k}"):
            koleo_loss(torch.randn(8, 2), k=k, n_groups=2)
    with pytest.raises(ValueError, match="k: expected 1, because a single row is its own only neighbour, got 2"):
        koleo_loss(torch.randn(3, 2), k=2, n_groups=3)
    with pytest.raises(ValueError, match="k: expected 1 to 0 neighbours of 1 rows, got 1"):
        nearest_neighbors(torch.randn(1, 2))
