"""The Sinkhorn-Knopp step as users call it: values, invariances, several processes, errors, PyTorch's machinery."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dinov2_kernels as dk
from dinov2_kernels.sinkhorn import reference
from tests.process_group import in_processes


def textbook(logits: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp as papers print it, on the matrix Q [K, B], with every global normalisation."""
    Q = torch.exp(logits.double() / temperature).T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(n_iterations):
        Q = Q / Q.sum(dim=1, keepdim=True) / K
        Q = Q / Q.sum(dim=0, keepdim=True) / B
    return (Q * B).T


def golden_logits() -> Tensor:
    return torch.sin(1.7 * torch.arange(48, dtype=torch.float64) + 0.3).float().view(6, 8)


def test_golden_values() -> None:
    assignments = dk.sinkhorn_knopp(golden_logits(), 0.07)
    first_row = torch.tensor([0.00025, 0.868513, 0, 0, 0.126887, 0.00435, 0, 0])
    mass = torch.tensor([0.54369, 0.95432, 0.78996, 0.73239, 0.59642, 0.91679, 0.82405, 0.64238])
    torch.testing.assert_close(assignments[0], first_row, atol=1e-6, rtol=0)
    torch.testing.assert_close(assignments.sum(dim=0), mass, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize(("B", "K"), [(1, 1), (1, 7), (13, 1), (6, 8), (101, 257), (64, 1000)])
def test_equals_the_textbook_form(B: int, K: int, n_iterations: int) -> None:
    logits = torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(B * K))
    assignments = dk.sinkhorn_knopp(logits, 0.1, n_iterations=n_iterations)
    torch.testing.assert_close(assignments.double(), textbook(logits, 0.1, n_iterations), atol=2e-7, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_sum_to_one_in_every_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(31, 97, generator=torch.Generator().manual_seed(0)).to(dtype)
    assignments = dk.sinkhorn_knopp(logits, 0.07)
    assert assignments.dtype == torch.float32
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(31), atol=1e-5, rtol=0)
    torch.testing.assert_close(assignments.double(), textbook(logits, 0.07), atol=3e-5, rtol=1e-3)


def test_global_shift_changes_nothing_and_a_sample_shift_does() -> None:
    logits = torch.randn(16, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assignments = dk.sinkhorn_knopp(logits, 0.04)
    torch.testing.assert_close(dk.sinkhorn_knopp(logits + 1e4, 0.04), assignments, atol=1e-6, rtol=1e-5)
    shifted = dk.sinkhorn_knopp(logits - logits.amax(dim=1, keepdim=True), 0.04)
    assert (shifted - assignments).abs().max() > 1e-3


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_huge_logits_stay_exact_in_the_log_domain(magnitude: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = magnitude * (2 * torch.rand(24, 50, dtype=torch.float64, generator=generator) - 1)
    log_u = torch.zeros(50, dtype=torch.float64)
    log_v = torch.zeros(24, dtype=torch.float64)
    for _ in range(3):  # both scaling vectors kept, every sum a log-sum-exp
        log_u = -torch.logsumexp(logits / 0.04 + log_v[:, None], dim=0)
        log_v = -torch.logsumexp(logits / 0.04 + log_u, dim=1)
    expected = torch.exp(logits / 0.04 + log_u + log_v[:, None])
    torch.testing.assert_close(dk.sinkhorn_knopp(logits, 0.04).double(), expected, atol=1e-6, rtol=1e-5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assignments = dk.sinkhorn_knopp(logits.to(dtype), 0.04)
        torch.testing.assert_close(assignments.sum(dim=1), torch.ones(24), atol=1e-5, rtol=0)


def test_bias_gives_the_assignments() -> None:
    logits = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))
    bias = dk.sinkhorn_bias(logits, 0.07)
    torch.testing.assert_close(torch.softmax(logits / 0.07 + bias, dim=1), dk.sinkhorn_knopp(logits, 0.07))


def test_empty_batch_has_a_neutral_bias() -> None:
    logits = torch.empty(0, 5)
    assert dk.sinkhorn_bias(logits, 0.07).tolist() == [0.0] * 5
    assert dk.sinkhorn_knopp(logits, 0.07).shape == (0, 5)


def test_a_prototype_that_is_switched_off_stays_off() -> None:
    logits = torch.randn(6, 4)
    logits[:, 2] = -torch.inf
    assignments = dk.sinkhorn_knopp(logits, 0.07)
    assert assignments[:, 2].eq(0).all()
    torch.testing.assert_close(assignments.sum(dim=1), torch.ones(6))


def test_result_carries_no_gradient() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    assert not dk.sinkhorn_bias(logits, 0.07).requires_grad
    assert not dk.sinkhorn_knopp(logits, 0.07).requires_grad


def test_strided_logits() -> None:
    logits = torch.randn(5, 12)
    torch.testing.assert_close(dk.sinkhorn_knopp(logits.T, 0.1), dk.sinkhorn_knopp(logits.T.contiguous(), 0.1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0.1), r"logits: expected shape \[B, K\] with K >= 1, got \[3\]"),
        ((torch.zeros(3, 0), 0.1), r"logits: expected shape \[B, K\] with K >= 1, got \[3, 0\]"),
        ((torch.zeros(3, 2, dtype=torch.int32), 0.1), "logits: expected a floating-point tensor, got torch.int32"),
        ((torch.zeros(3, 2), 0.0), "temperature: expected a number above 0, got 0.0"),
        ((torch.zeros(3, 2), float("nan")), "temperature: expected a number above 0, got nan"),
    ],
)
def test_bad_arguments(arguments: tuple[Tensor, float], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        dk.sinkhorn_bias(*arguments)


def test_bad_number_of_iterations() -> None:
    with pytest.raises(ValueError, match="n_iterations: expected at least 1, got 0"):
        dk.sinkhorn_bias(torch.zeros(2, 2), 0.1, n_iterations=0)


@pytest.mark.parametrize("shape", [(6, 8), (0, 8), (1, 1)])
@pytest.mark.parametrize("operator", ["bias", "column_logsumexp", "column_mass", "assign"])
def test_opcheck(operator: str, shape: tuple[int, int]) -> None:
    logits, bias = torch.randn(*shape), torch.randn(shape[1])
    more: tuple[object, ...] = {"bias": (3,), "column_logsumexp": ()}.get(operator, (bias,))
    torch.library.opcheck(getattr(torch.ops.dinov2_kernels, f"sinkhorn_{operator}").default, (logits, 0.07, *more))


def test_compiles_into_one_graph() -> None:
    logits = torch.randn(10, 30)
    compiled = torch.compile(lambda x: dk.sinkhorn_knopp(x.relu(), 0.07), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), dk.sinkhorn_knopp(logits.relu(), 0.07))


def test_backends_can_be_forced() -> None:
    logits = torch.randn(7, 11)
    with dk.use_backend("reference"):
        torch.testing.assert_close(dk.sinkhorn_bias(logits, 0.07), reference.sinkhorn_bias(logits, 0.07))
    with dk.use_backend("native"):
        torch.testing.assert_close(dk.sinkhorn_bias(logits, 0.07), reference.sinkhorn_bias(logits, 0.07))
    with pytest.raises(ValueError, match="name: expected one of reference, triton, native, got 'cuda'"):
        dk.use_backend("cuda")  # type: ignore[arg-type]


def test_padding_rows_are_left_out_by_slicing() -> None:
    padded = torch.full((9, 20), torch.nan)
    padded[:6] = torch.randn(6, 20, generator=torch.Generator().manual_seed(5))
    assert torch.equal(dk.sinkhorn_bias(padded[:6], 0.07), dk.sinkhorn_bias(padded[:6].clone(), 0.07))


def test_several_batches_are_balanced_apart() -> None:
    logits = [torch.randn(B, K, dtype=dtype) for B, K, dtype in ((5, 8, torch.float32), (0, 3, torch.float64))]
    biases = dk.sinkhorn_biases(logits, 0.07)
    assert all(torch.equal(bias, dk.sinkhorn_bias(x, 0.07)) for bias, x in zip(biases, logits, strict=True))
    assert dk.sinkhorn_biases([], 0.07) == []


def _worker(rank: int, world_size: int, splits: list[int], logits: list[Tensor], results: list[Tensor]) -> None:
    counts: list[int] = []
    real_all_reduce = dist.all_reduce

    def counting_all_reduce(tensor: Tensor, *args: object, **kwargs: object) -> object:
        counts.append(tensor.numel())
        return real_all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting_all_reduce
    mine = [x.split(splits)[rank] for x in logits]
    biases = dk.sinkhorn_biases(mine, 0.05, group=dist.group.WORLD)
    results[rank].copy_(torch.cat(biases))
    # The first reduction is a log-sum-exp, by all-to-all and all-gather.
    assert counts == ([] if world_size == 1 else [len(results[rank])] * 2)
    assert torch.equal(dk.sinkhorn_bias(mine[0], 0.05, group=dist.group.WORLD), biases[0])
    foreign = dist.new_group([0])
    if rank > 0:
        with pytest.raises(ValueError, match="group: expected a process group to which this process belongs"):
            dk.sinkhorn_bias(mine[0], 0.05, group=foreign)


@pytest.mark.parametrize("splits", [[13], [5, 8], [0, 13], [3, 1, 0, 9]])
def test_processes_equal_one_process_on_the_whole_batch(splits: list[int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = [3 * torch.randn(13, K, dtype=torch.float64, generator=generator) for K in (21, 8)]
    results = [torch.full((29,), torch.nan).share_memory_() for _ in splits]
    in_processes(len(splits), tmp_path, _worker, splits, logits, results)
    expected = torch.cat(dk.sinkhorn_biases(logits, 0.05))
    for biases in results:
        torch.testing.assert_close(biases, expected, atol=1e-5, rtol=1e-6)
