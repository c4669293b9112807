"""torch.compile and torch.export of whole blocks, with shapes that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Block, SwiGLUFFN, run_blocks
from dinov2_kernels.residual import draw_subsets

Function = Callable[..., Tensor]


class Counting:
    """A backend that runs what is captured, forward and backward, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


def graphs_of(function: Function, parameters: list[Tensor], calls: list[tuple[Any, ...]], dynamic: bool | None) -> int:
    """Compile a function, compare outputs and gradients of all calls with eager mode, and return the graphs made."""
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for x, *others in calls:
        results = []
        for run in (function, compiled):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            y = run(leaf, *others)
            results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    return backend.graphs


@pytest.mark.parametrize(("rate", "dynamic"), [(0.1, None), (0.3, None), (0.3, True), (0.9, None)])
def test_two_graphs_serve_every_number_of_samples(rate: float, dynamic: bool | None) -> None:
    """PyTorch makes one for a batch of one sample, and one for all others: none of its own for each kept number."""
    torch.manual_seed(0)
    block = Block(16, num_heads=2, drop_path=rate, init_values=0.5)
    calls = [(torch.randn(count, 3, 16),) for count in (1, 2, 3, 4, 5, 7, 9, 10, 13, 30)]
    restarts = 1 if dynamic else 0  # with dynamic=True, PyTorch captures the first graph twice: floats are symbols then
    assert graphs_of(block, list(block.parameters()), calls, dynamic) <= 2 + restarts


@pytest.mark.parametrize("dynamic", [None, True])
def test_two_graphs_serve_packed_crops_through_several_blocks(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(Block(16, num_heads=2, drop_path=rate, ffn_layer=SwiGLUFFN) for rate in (0.3, 0.6))

    def run(x: Tensor, layout_of: tuple[int, int, int, int]) -> Tensor:
        count, length, more, shorter = layout_of
        layout = PackedLayout([(count, length), (more, shorter)])
        subsets = draw_subsets(x, layout, [rate for block in blocks for rate in block.drop_rates])
        return run_blocks(list(blocks), x, layout, [subsets[:2], subsets[2:]])

    calls = []
    for runs in [(2, 9, 7, 4), (3, 11, 5, 6), (4, 6, 8, 3), (9, 2, 10, 5), (5, 5, 6, 7), (6, 4, 3, 9), (8, 7, 2, 8)]:
        tokens = runs[0] * runs[1] + runs[2] * runs[3]
        calls.append((torch.randn(tokens, 16), runs))
    assert graphs_of(run, list(blocks.parameters()), calls, dynamic) <= 2


def test_a_batch_that_is_marked_as_dynamic_is_dynamic() -> None:
    torch._dynamo.reset()
    block = Block(16, num_heads=2, drop_path=0.3)
    backend = Counting()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for count in (4, 7, 12):
        x = torch.randn(count, 3, 16)
        torch._dynamo.mark_dynamic(x, 0)
        assert compiled(x).shape == x.shape
    assert backend.graphs == 1


def test_offsets_of_a_layout_take_two_graphs() -> None:
    def offsets(x: Tensor, count: int) -> Tensor:
        return x * PackedLayout([(count, 3), (2, count)]).cu_seqlens("cpu")[-1]

    assert graphs_of(offsets, [], [(torch.randn(3), count) for count in range(3, 15)], None) <= 2


def test_exports_in_training_mode() -> None:
    block = Block(16, num_heads=2, drop_path=0.3, init_values=0.5).train()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)}, None)
    exported = torch.export.export(block, (torch.randn(4, 5, 16), None), dynamic_shapes=shapes)
    for count in (4, 2, 9, 10):
        x = torch.randn(count, 5, 16)
        torch.manual_seed(0)
        expected = block(x)
        torch.manual_seed(0)
        torch.testing.assert_close(exported.module()(x, None), expected)


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
