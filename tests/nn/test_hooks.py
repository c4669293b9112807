"""Hooks and changes of a block's parts take effect: a part is fused only while it does what its class says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from dinov2_kernels import PackedLayout
from dinov2_kernels.nn import Attention, Block, LayerScale, Mlp, SwiGLUFFN, run_blocks
from dinov2_kernels.residual import draw_subsets

LAYOUT = PackedLayout([(2, 5)])
KINDS: dict[str, dict[str, Any]] = {
    "Mlp": {"init_values": 0.5},
    "without LayerScale": {"init_values": None},
    "SwiGLU": {"init_values": 0.5, "ffn_layer": SwiGLUFFN},
    "norms of queries and keys": {"init_values": 0.5, "qk_norm": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_block(kind: str) -> Block:
    torch.manual_seed(0)
    block = Block(16, num_heads=2, **KINDS[kind]).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def tokens() -> Tensor:
    return torch.randn(10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_parts(block: Block, x: Tensor) -> Tensor:
    """What the block is defined to compute, each part called."""

    def attend(x: Tensor) -> Tensor:
        attn = block.attn
        q, k, v = attn.qkv(x).unflatten(1, (3, 2, 8)).unbind(1)  # [T, H, D]
        q, k, v = (y.unflatten(0, (2, 5)).transpose(1, 2) for y in (attn.q_norm(q), attn.k_norm(k), v))
        y = (q @ k.mT / 8**0.5).softmax(dim=-1) @ v
        return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(0, 1).flatten(1)))

    def feed_forward(x: Tensor) -> Tensor:
        mlp = block.mlp
        if isinstance(mlp, SwiGLUFFN):
            gate, value = mlp.w12(x).chunk(2, dim=-1)
            return mlp.drop(mlp.w3(mlp.drop(nn.functional.silu(gate) * value)))
        return mlp.drop2(mlp.fc2(mlp.norm(mlp.drop1(mlp.act(mlp.fc1(x))))))

    x = x + block.ls1(attend(block.norm1(x)))
    return x + block.ls2(feed_forward(block.norm2(x)))


def run(block: Block, x: Tensor) -> Tensor:
    return block(x, LAYOUT)


def in_a_chain(block: Block, x: Tensor) -> Tensor:
    return run_blocks([block], x, LAYOUT, [draw_subsets(x, LAYOUT, block.drop_rates)])


def innermost(block: Block) -> list[str]:
    return [name for name, part in block.named_modules() if not list(part.children())]


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda part: part.register_forward_hook(lambda _, __, result: 0.5 * result),
    "forward pre": lambda part: part.register_forward_pre_hook(lambda _, args: (0.5 * args[0], *args[1:])),
    "forward with arguments by name": lambda part: part.register_forward_hook(
        lambda _, __, ___, result: 0.5 * result, with_kwargs=True
    ),
    "backward": lambda part: part.register_full_backward_hook(
        lambda _, grads, __: tuple(None if g is None else 0.5 * g for g in grads)
    ),
    "backward pre": lambda part: part.register_full_backward_pre_hook(
        lambda _, grads: tuple(None if g is None else 0.5 * g for g in grads)
    ),
    "another forward": lambda part: setattr(part, "forward", lambda x, forward=part.forward: 0.5 * forward(x)),
}


@every_kind
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("function", [run, in_a_chain])
def test_hooks_of_every_part_take_effect(kind: str, hook: str, function: Callable[[Block, Tensor], Tensor]) -> None:
    for name in innermost(random_block(kind)):
        block = random_block(kind)
        HOOKS[hook](block.get_submodule(name))
        results = []
        for compute in (function, by_parts):
            x = tokens().requires_grad_()
            y = compute(block, x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
        torch.testing.assert_close(*results, msg=lambda m, name=name: f"{name}: {m}")


@every_kind
@pytest.mark.parametrize("kind_of_hook", ["forward_hook", "full_backward_hook"])
def test_hooks_of_all_modules_see_every_part(kind: str, kind_of_hook: str) -> None:
    block, seen = random_block(kind), set()
    with getattr(torch_module, f"register_module_{kind_of_hook}")(lambda module, *_: seen.add(module)):
        run(block, tokens().requires_grad_()).sum().backward()
    assert seen == set(block.modules())


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class HalfIdentity(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


class GatedLayerScale(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sigmoid()


class Recording(nn.Dropout):
    """A dropout of rate 0 that is there for something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@every_kind
@pytest.mark.parametrize(
    ("names", "make"),
    [
        (("ls1", "ls2"), Shift),
        (("ls1", "ls2"), HalfIdentity),
        (("ls1", "ls2"), partial(GatedLayerScale, 16, 0.5)),
        (("attn.q_norm", "attn.k_norm"), HalfIdentity),
        (("attn.proj_drop",), partial(Recording, 0.0)),
        (("mlp.drop", "mlp.drop1", "mlp.drop2"), partial(Recording, 0.0)),
        (("mlp.norm",), HalfIdentity),
        (("mlp.act",), Shift),
        (("norm1", "norm2"), Shift),
    ],
)
def test_other_parts_are_called(kind: str, names: tuple[str, ...], make: Callable[[], nn.Module]) -> None:
    block = random_block(kind)
    plain = run(block, tokens())
    there = [name for name in names if name in innermost(block)]
    for name in there:
        block.set_submodule(name, make().double())
    result = run(block, tokens())
    torch.testing.assert_close(result, by_parts(block, tokens()))
    assert torch.allclose(result, plain) == (not there)


@every_kind
@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.Linear, nn.GELU, nn.Dropout, nn.Identity, LayerScale])
def test_another_forward_in_the_place_of_a_class_s_is_called(
    kind: str, cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, forward = random_block(kind), cls.forward
    plain = run(block, tokens())
    monkeypatch.setattr(cls, "forward", lambda self, x: 0.5 * forward(self, x))
    result = run(block, tokens())
    torch.testing.assert_close(result, by_parts(block, tokens()))
    assert torch.allclose(result, plain) == (not any(isinstance(part, cls) for part in block.modules()))


def test_another_call_of_all_modules_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    block, call, seen = random_block("Mlp"), nn.Module.__call__, set()
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: seen.add(self) or call(self, *args))
    run(block, tokens())
    assert seen == set(block.modules())


@every_kind
def test_parametrizations_take_effect(kind: str) -> None:
    """And are computed once in each call."""

    class Half(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Half.calls += 1
            return 0.5 * x

    block = random_block(kind)
    parts = [block.get_submodule(name) for name in innermost(block)]
    named = [(part, "weight" if hasattr(part, "weight") else "gamma") for part in parts if list(part.parameters())]
    for part, name in named:
        parametrize.register_parametrization(part, name, Half())
    Half.calls = 0
    result = run(block, tokens())
    assert Half.calls == len(named)
    torch.testing.assert_close(result, by_parts(block, tokens()))


def test_forwards_that_were_replaced_before_the_import_count_as_replaced() -> None:
    from dinov2_kernels._modules import own_forward

    forward = nn.Linear.forward
    assert own_forward(nn.Linear) is forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x))
        assert own_forward(nn.Linear) is None
    for cls in (Attention, Block, LayerScale, Mlp, SwiGLUFFN):
        assert own_forward(cls) is cls.forward
