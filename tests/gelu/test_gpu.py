"""The Triton kernel on a GPU, reached as the feed-forward layer reaches it: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels.gelu import gelu_backward_, reference
from dinov2_kernels.nn import Mlp
from tests.gelu.cases import CASES, DTYPES, Case, assert_matches_reference
from tests.pairs import pairs

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (Case((32896, 4096)), Case((32896, 1536), spread=30.0, tanh=True), Case((10007, 1365)))


@pytest.mark.parametrize(("case", "dtype"), pairs(CASES + LARGE, DTYPES), ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(torch.ops.dinov2_kernels.gelu_backward_, case, dtype, "cuda")


def test_the_same_from_run_to_run() -> None:
    grad, z = torch.randn(2, 32896, 1536, device="cuda").bfloat16()
    results = [gelu_backward_(grad.clone(), z) for _ in range(3)]
    for h, dz_sum in results[1:]:
        assert torch.equal(h, results[0][0])
        assert torch.equal(dz_sum, results[0][1])


def test_cuda_graph() -> None:
    """A graph captures a whole feed-forward layer, forward and backward."""
    layer, x = Mlp(384, 1536).cuda(), torch.randn(257, 384, device="cuda", requires_grad=True)
    inputs = [x, *layer.parameters()]
    torch.autograd.grad(layer(x).square().sum(), inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = torch.autograd.grad(layer(x).square().sum(), inputs)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    plain = layer.fc2(layer.act(layer.fc1(x)))
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    z = torch.randn(2**19 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(z)
    grad[-3:] = 1
    h, dz_sum = gelu_backward_(grad, z)
    dz = torch.ones(3, 4096, device="cuda")
    expected, expected_sum = reference.gelu_backward_(dz, z[-3:].float(), False)
    torch.testing.assert_close(h[-3:], expected.bfloat16())
    torch.testing.assert_close(grad[-3:], dz.bfloat16())
    torch.testing.assert_close(dz_sum, expected_sum, rtol=1e-5, atol=1e-5)
