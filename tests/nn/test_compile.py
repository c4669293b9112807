"""torch.compile and torch.export of whole blocks, with shapes that change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dinov2_kernels.nn import Block


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_one_graph_serves_sequences_of_any_length(rate: float) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(16, num_heads=2, drop_path=rate, init_values=0.5)
    graphs = 0

    def counting_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counting_backend)
    for length in (5, 9, 14):
        x = torch.randn(4, length, 16)
        results = []
        for function in (block, compiled):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *block.parameters()])))
        torch.testing.assert_close(*results)
    assert graphs == 1


def test_exports_with_a_batch_of_any_size() -> None:
    block = Block(16, num_heads=2, init_values=0.5).eval()
    shapes = ({0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}, None)
    exported = torch.export.export(block, (torch.randn(4, 5, 16), None), dynamic_shapes=shapes)
    x = torch.randn(7, 11, 16)
    torch.testing.assert_close(exported.module()(x, None), block(x))
