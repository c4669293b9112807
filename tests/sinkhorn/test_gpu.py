"""Triton and CUDA C++ on a GPU: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.sinkhorn import reference, triton_kernel
from tests.pairs import pairs
from tests.sinkhorn.cases import (
    CASES,
    DTYPES,
    Case,
    Operators,
    assert_infinite_and_missing_logits,
    assert_matches_reference,
    operators_of,
)

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (
    Case(128, 65536, temperature=0.04, magnitude=1e4),
    Case(4900, 8192),
    Case(1031, 70001),
    Case(301, 131072),  # sixteen blocks to a cluster in bfloat16
)


@pytest.fixture(params=["triton", "native"])
def operators(request: pytest.FixtureRequest) -> Operators:
    return triton_kernel if request.param == "triton" else operators_of("dinov2_kernels_cuda")


@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype, operators: Operators) -> None:
    assert_matches_reference(operators, case, dtype, "cuda")


def test_values_of_infinite_and_missing_logits(operators: Operators) -> None:
    assert_infinite_and_missing_logits(operators, "cuda")


def test_results_do_not_change_from_run_to_run(operators: Operators) -> None:
    logits = Case(513, 65536).logits(torch.bfloat16, "cuda")
    bias = -operators.column_logsumexp(logits, 0.07)
    mass = operators.column_mass(logits, 0.07, bias)
    whole = operators.sinkhorn_bias(logits, 0.07, 3)
    for _ in range(10):
        assert torch.equal(operators.sinkhorn_bias(logits, 0.07, 3), whole)
        assert torch.equal(operators.column_logsumexp(logits, 0.07), -bias)
        assert torch.equal(operators.column_mass(logits, 0.07, bias), mass)


@pytest.mark.large
def test_more_than_two_to_the_31_elements(operators: Operators) -> None:
    B, K = 33000, 65552
    logits = torch.randn(B, K, dtype=torch.bfloat16, device="cuda")
    bias = torch.zeros(K, device="cuda")
    lse = operators.column_logsumexp(logits, 0.5)
    torch.testing.assert_close(lse[-9:], reference.column_logsumexp(logits[:, -9:], 0.5), atol=1e-4, rtol=1e-5)
    assignments = operators.assign(logits, 0.5, bias)
    torch.testing.assert_close(assignments[-3:], reference.assign(logits[-3:], 0.5, bias), atol=1e-7, rtol=1e-4)
    mass = operators.column_mass(logits, 0.5, bias)
    torch.testing.assert_close(mass, assignments.sum(dim=0), atol=1e-5, rtol=1e-4)
    first = operators.sinkhorn_bias(logits, 0.5, 1)
    torch.testing.assert_close(first, -lse, atol=1e-4, rtol=1e-5)
    second = first - operators.column_mass(logits, 0.5, first).log()
    torch.testing.assert_close(operators.sinkhorn_bias(logits, 0.5, 2), second, atol=1e-4, rtol=1e-5)
