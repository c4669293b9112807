"""The Triton kernels on a GPU, reached as users reach them: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import swiglu
from dinov2_kernels.swiglu import reference
from tests.pairs import pairs
from tests.swiglu.cases import CASES, DTYPES, Case, assert_matches_reference

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (Case((32896, 2 * 4096)), Case((32896, 2 * 1536), gate=1e4), Case((10007, 2 * 1365)))


@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(torch.ops.dinov2_kernels, case, dtype, "cuda")


def test_cuda_graph() -> None:
    x12 = torch.randn(257, 2 * 384, device="cuda", requires_grad=True)
    torch.autograd.grad(swiglu(x12).square().sum(), x12)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (result,) = torch.autograd.grad(swiglu(x12).square().sum(), x12)
    with torch.no_grad():
        x12.normal_()
    graph.replay()
    (expected,) = torch.autograd.grad(reference.swiglu(x12).square().sum(), x12)
    torch.testing.assert_close(result, expected)


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    x12 = torch.randn(2**18 + 3, 2 * 4096, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(swiglu(x12)[-3:], reference.swiglu(x12[-3:].float()).bfloat16())
    grad = torch.ones(len(x12), 4096, dtype=torch.bfloat16, device="cuda")
    dx12 = torch.ops.dinov2_kernels.swiglu_backward(grad, x12)
    expected = reference.swiglu_backward(grad[-3:].float(), x12[-3:].float()).bfloat16()
    torch.testing.assert_close(dx12[-3:], expected)
