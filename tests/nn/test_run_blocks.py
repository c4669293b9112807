"""Blocks one after the other: what each would compute if it were called, in one chain where nobody can tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Attention, Block, Mlp, run_blocks
from dinov2_kernels.residual import Subset, draw_subsets
from tests.dispatches import Calls

LAYOUT = PackedLayout([(5, 3), (4, 2)])
RATES = (0.0, 0.3, 0.5)
FUSED, GATHER, SCATTER, IN_PLACE = (
    f"dinov2_kernels::residual_{name}" for name in ("scatter_gather_norm", "gather_norm", "scatter", "scatter_")
)


class Twice(Block):
    """Another forward than a block's."""

    def forward(self, x: Tensor, layout: PackedLayout | None = None, subsets: Any = None) -> Tensor:
        return 2 * super().forward(x, layout, subsets)


def blocks_of(kind: type[Block] = Block) -> list[Block]:
    """Three blocks in float64; the one in the middle is of this kind."""
    kinds = (Block, kind, Block)
    blocks = [of(16, 2, init_values=0.5, drop_path=rate) for of, rate in zip(kinds, RATES, strict=True)]
    return [block.double() for block in blocks]


def pairs_of(x: Tensor, blocks: list[Block]) -> list[tuple[Subset, Subset]]:
    subsets = draw_subsets(x, LAYOUT, [rate for block in blocks for rate in block.drop_rates])
    return list(zip(subsets[::2], subsets[1::2], strict=True))


def one_by_one(blocks: list[Block], x: Tensor, subsets: list[tuple[Subset, Subset]]) -> Tensor:
    for block, of_block in zip(blocks, subsets, strict=True):
        x = block(x, LAYOUT, of_block)
    return x


def assert_same(blocks: list[Block]) -> Calls:
    """Results and gradients are the same to the bit; returns what the forward pass called."""
    x = torch.randn(LAYOUT.total_tokens, 16, dtype=torch.float64, requires_grad=True)
    subsets, calls = pairs_of(x, blocks), Calls()
    with calls:
        y = run_blocks(blocks, x, LAYOUT, subsets)
    expected = one_by_one(blocks, x, subsets)
    leaves = [x, *(p for block in blocks for p in block.parameters() if p.requires_grad)]
    actual = (y, *torch.autograd.grad(y.square().sum(), leaves))
    assert all(map(torch.equal, actual, (expected, *torch.autograd.grad(expected.square().sum(), leaves))))
    with torch.no_grad():
        assert torch.equal(run_blocks(blocks, x, LAYOUT, subsets), y)
    return calls


def calls_of_residuals(calls: Calls) -> list[int]:
    return [calls.of[name] for name in (GATHER, FUSED, SCATTER, IN_PLACE)]


def test_neighbours_are_one_chain() -> None:
    assert calls_of_residuals(assert_same(blocks_of())) == [1, 5, 1, 0]


def test_in_evaluation_and_with_frozen_blocks() -> None:
    blocks = [block.eval() for block in blocks_of()]
    blocks[0].requires_grad_(False)
    assert calls_of_residuals(assert_same(blocks)) == [1, 5, 1, 0]


def with_a_forward_hook(block: Block) -> None:
    block.register_forward_hook(lambda _, inputs, output: output + inputs[0])


def with_a_forward_pre_hook(block: Block) -> None:
    block.register_forward_pre_hook(lambda _, inputs: (3 * inputs[0], *inputs[1:]))


def with_a_backward_hook(block: Block) -> None:
    block.register_full_backward_hook(lambda _, grads, __: (3 * grads[0], *grads[1:]))


def with_another_forward(block: Block) -> None:
    forward = block.forward
    block.forward = lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)  # type: ignore[method-assign]


def compiled(block: Block) -> None:
    block.compile(backend="eager")


@pytest.mark.parametrize(
    "change", [with_a_forward_hook, with_a_forward_pre_hook, with_a_backward_hook, with_another_forward, compiled]
)
def test_a_block_that_is_watched_is_called(change: Callable[[Block], None]) -> None:
    blocks = blocks_of()
    change(blocks[1])
    assert calls_of_residuals(assert_same(blocks)) == [3, 3, 3, 0]


def test_another_forward_of_a_subclass_is_called() -> None:
    assert calls_of_residuals(assert_same(blocks_of(Twice))) == [3, 3, 3, 0]


def test_another_forward_in_place_of_the_class_s_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tools change the classes of a library from outside."""
    called: Counter[type[nn.Module]] = Counter()
    for kind in (Block, Attention, Mlp):

        def counting(*inputs: Any, kind: Any = kind, forward: Any = kind.forward) -> Any:
            called[kind] += 1
            return 2 * forward(*inputs)

        monkeypatch.setattr(kind, "forward", counting)
    blocks, x = blocks_of(), torch.randn(LAYOUT.total_tokens, 16, dtype=torch.float64)
    run_blocks(blocks, x, LAYOUT, pairs_of(x, blocks))
    assert called == {Block: 3, Attention: 3, Mlp: 3}


def test_other_modules_are_called() -> None:
    """Tools that recompute activations wrap blocks in modules of their own."""

    class Wrapper(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, *inputs: Any) -> Any:
            return -self.block(*inputs)

    blocks = blocks_of()
    x = torch.randn(LAYOUT.total_tokens, 16, dtype=torch.float64)
    subsets = pairs_of(x, blocks)
    wrapped: Any = [blocks[0], Wrapper(blocks[1]), blocks[2]]
    assert torch.equal(run_blocks(wrapped, x, LAYOUT, subsets), one_by_one(wrapped, x, subsets))


def test_hooks_of_what_is_within_a_block_fire() -> None:
    blocks, seen = blocks_of(), []
    expected = [block.get_submodule(name) for block in blocks[1:] for name in ("norm1", "attn", "norm2", "mlp.act")]
    for part in expected:
        part.register_forward_hook(lambda module, *_: seen.append(module))
    assert_same(blocks)
    assert seen[: len(expected)] == expected


def test_blocks_that_recompute_are_a_chain_of_their_own() -> None:
    blocks = blocks_of()
    for block in blocks[1:]:
        block.recompute = True
    x = torch.randn(LAYOUT.total_tokens, 16, dtype=torch.float64, requires_grad=True)
    subsets, calls = pairs_of(x, blocks), Calls()
    with calls:
        y = run_blocks(blocks, x, LAYOUT, subsets)
    # What the second chain makes, it overwrites: that moves as much as a pass with the next gather, and keeps less.
    assert calls_of_residuals(calls) == [4, 2, 1, 3]
    leaves = [x, *(p for block in blocks for p in block.parameters())]
    expected = one_by_one(blocks, x, subsets)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def test_no_blocks_leave_the_tokens() -> None:
    x = torch.randn(LAYOUT.total_tokens, 16)
    assert run_blocks([], x, LAYOUT, []) is x


def test_there_must_be_subsets_for_each_block() -> None:
    blocks, x = blocks_of(), torch.randn(LAYOUT.total_tokens, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="subsets: expected one pair for each of the 3 blocks, got 2"):
        run_blocks(blocks, x, LAYOUT, pairs_of(x, blocks)[:2])
