"""How often a training step of one block calls PyTorch's dispatcher: on a GPU each call costs the host some 5 us."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Block
from dinov2_kernels.residual import draw_subsets
from tests.dispatches import VIEWS, Calls

LAYOUT = PackedLayout([(4, 5), (6, 2)])


def student(block: Block, x: torch.Tensor, calls: Calls) -> None:
    subsets, grad = draw_subsets(x, LAYOUT, block.drop_rates), torch.ones_like(x)  # the network draws for all blocks
    x.requires_grad_()
    with calls:
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x, LAYOUT, subsets)
        y.backward(grad)


def teacher(block: Block, x: torch.Tensor, calls: Calls) -> None:
    block.eval()
    with calls, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        block(x, LAYOUT)


@pytest.mark.parametrize(("step", "most"), [(student, 44), (teacher, 17)])
def test_calls_of_a_block_and_step(step: Callable[[Block, torch.Tensor, Calls], None], most: int) -> None:
    """Forward and backward under autocast, without views."""
    block, calls = Block(32, 2, qkv_bias=True, init_values=1e-5, drop_path=0.3), Calls()
    step(block, torch.randn(LAYOUT.total_tokens, 32), calls)
    launching = sum(count for name, count in calls.of.items() if name not in VIEWS)
    assert launching <= most, f"{launching} calls that are no views:\n{calls}"
