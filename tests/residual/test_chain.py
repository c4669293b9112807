"""Residual connections one after the other: as each of them alone, with one pass between two where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_kernels import PackedLayout, stochastic_depth, use_backend
from dinov2_kernels.residual import Connection, Subset, draw_subsets, residual_chain
from tests.dispatches import Calls
from tests.tolerance import assert_at_most_twice_the_error

LAYOUT = PackedLayout([(5, 3), (4, 2)])
RATES = {"both drop": (0.3, 0.5), "none": (0.0, 0.0), "the first": (0.4, 0.0), "the second": (0.0, 0.4)}


class Parts(nn.Module):
    """What surrounds the branches of a chain, and leaves to derive by."""

    def __init__(self, length: int, C: int = 6, *, dtype: torch.dtype = torch.float64, with_bias: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(C, dtype=dtype) for _ in range(length))
        self.linears = nn.ModuleList(nn.Linear(C, C, bias=False, dtype=dtype) for _ in range(length))
        self.gammas = nn.ParameterList(torch.randn(C, dtype=dtype) for _ in range(length))
        self.biases = nn.ParameterList(torch.randn(C, dtype=dtype) for _ in range(length * with_bias))
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.normal_(1, 0.3)
                norm.bias.normal_(0, 0.3)

    def connections(self, subsets: list[Subset]) -> list[Connection]:
        biases = list(self.biases) if len(self.biases) else [None] * len(subsets)
        parts = zip(self.linears, subsets, self.norms, self.gammas, biases, strict=True)
        return [
            Connection(lambda h, _, linear=linear: linear(h).tanh(), *others)  # type: ignore[misc]
            for linear, *others in parts
        ]


def one_after_the_other(x: Tensor, connections: list[Connection]) -> Tensor:
    for branch, subset, norm, gamma, bias in connections:
        x = stochastic_depth(x, LAYOUT, branch, subset=subset, norm=norm, gamma=gamma, bias=bias)
    return x


def chain(x: Tensor, connections: list[Connection], **options: bool) -> Tensor:
    return residual_chain(x, LAYOUT, connections, **options)


def assert_same(parts: nn.Module, x: Tensor, connections: list[Connection], **options: bool) -> None:
    results = []
    for function in (lambda x: chain(x, connections, **options), lambda x: one_after_the_other(x, connections)):
        y = function(x)
        leaves = [x, *(p for p in parts.parameters() if p.requires_grad)]
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)))
        with torch.no_grad():
            torch.testing.assert_close(function(x), y)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_values_and_gradients(rates: tuple[float, float], length: int, recompute: bool) -> None:
    torch.manual_seed(0)
    parts, x = Parts(length), torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64, requires_grad=True)
    connections = parts.connections(draw_subsets(x, LAYOUT, (rates * 2)[:length]))
    assert_same(parts, x, connections, recompute=recompute)


def _nothing(connection: Connection) -> dict[str, Any]:
    return {"gamma": None, "bias": None}


def _hooked(connection: Connection) -> dict[str, Any]:
    connection.norm.register_forward_hook(lambda module, inputs, result: 2 * result)
    return {}


VARIANTS: dict[str, Callable[[Connection], dict[str, Any]]] = {
    "no gamma, no bias": _nothing,
    "no gamma": lambda connection: {"gamma": None},
    "no bias": lambda connection: {"bias": None},
    "no norm": lambda connection: {"norm": None},
    "a norm with a hook": _hooked,
    "a norm without parameters": lambda connection: {
        "norm": nn.LayerNorm(6, elementwise_affine=False, dtype=torch.float64)
    },
    "a function as norm": lambda connection: {"norm": torch.tanh},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_variants(variant: Callable[[Connection], dict[str, Any]], which: int, recompute: bool) -> None:
    torch.manual_seed(0)
    parts, x = Parts(2), torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64, requires_grad=True)
    connections = parts.connections(draw_subsets(x, LAYOUT, (0.3, 0.5)))
    connections[which] = connections[which]._replace(**variant(connections[which]))
    assert_same(parts, x, connections, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute: bool) -> None:
    torch.manual_seed(0)
    parts, x = Parts(2), torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64, requires_grad=True)
    subsets = draw_subsets(x, LAYOUT, (0.5, 0.5))
    names = [name for name, _ in parts.named_parameters() if "linears" not in name]
    leaves = [parts.get_parameter(name).detach().clone().requires_grad_() for name in names]
    parts.forward = lambda x: chain(x, parts.connections(subsets), recompute=recompute)  # type: ignore[method-assign]

    def apply(x: Tensor, *leaves: Tensor) -> Tensor:
        return torch.func.functional_call(parts, dict(zip(names, leaves, strict=True)), (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(apply, (x, *leaves))


@pytest.mark.parametrize("gradient", [False, True])
def test_one_pass_lies_between_two_connections(gradient: bool) -> None:
    parts, x = Parts(2), torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64)
    connections = parts.connections(draw_subsets(x, LAYOUT, (0.3, 0.5)))
    with torch.set_grad_enabled(gradient), Calls() as calls:
        y = chain(x, connections)
        if gradient:
            y.sum().backward()
    ours = "dinov2_kernels::residual_"
    of_residual = {name.removeprefix(ours): n for name, n in calls.of.items() if name.startswith(ours)}
    forward = {"gather_norm": 1, "scatter_gather_norm": 1, "scatter": 1}
    backward = {"scatter_backward": 1, "scatter_gather_norm_backward": 1, "gather_norm_backward": 1}
    assert of_residual == forward | (backward if gradient else {})


def test_triton() -> None:
    """Forward and backward, with Triton behind every operator."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, test_gpu.py runs the compiled kernels")
    torch.manual_seed(0)
    parts, x = Parts(2), torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64, requires_grad=True)
    connections = parts.connections(draw_subsets(x, LAYOUT, (0.3, 0.5)))
    with use_backend("triton"):
        y = chain(x, connections)
        result = (y, *torch.autograd.grad(y.square().sum(), [x, *parts.parameters()]))
    y = chain(x, connections)
    torch.testing.assert_close(result, (y, *torch.autograd.grad(y.square().sum(), [x, *parts.parameters()])))


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast(recompute: bool) -> None:
    """Branches see bfloat16, tokens stay float32, and the error is that of PyTorch's own operators."""
    torch.manual_seed(0)
    wide = Parts(2, 32)
    narrow = Parts(2, 32, dtype=torch.float32)
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(LAYOUT.total_tokens, 32)
    subsets = draw_subsets(x, LAYOUT, (0.3, 0.5))

    def results(parts: Parts, dtype: torch.dtype, norm_of: Callable[[nn.Module], Any]) -> tuple[Tensor, ...]:
        of_dtype = [s._replace(scale=s.scale.to(dtype)) for s in subsets if s.scale is not None]
        connections = [c._replace(norm=norm_of(c.norm)) for c in parts.connections(of_dtype)]
        leaf = x.to(dtype).requires_grad_()
        y = chain(leaf, connections, recompute=recompute)
        assert y.dtype == dtype
        return y, *torch.autograd.grad(
            y.square().sum(), [leaf, *parts.gammas, *parts.biases, *parts.norms.parameters()]
        )

    exact = results(wide, torch.float64, lambda norm: norm)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(narrow, torch.float32, lambda norm: lambda tokens: norm(tokens))
        fused = results(narrow, torch.float32, lambda norm: norm)
    for index, compared in enumerate(zip(fused, plain, exact, strict=True)):
        # With `recompute` the normalised tokens are recovered from h, which is rounded.
        rounding = 2**-8 * compared[-1].abs().max().item() if recompute and index >= 6 else 0.0
        assert_at_most_twice_the_error(str(index), *compared, floor=1e-5 + rounding)


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing(recompute: bool) -> None:
    """The drawn subset is used again: no generator is asked."""
    torch.manual_seed(0)
    parts, x = Parts(2), torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64, requires_grad=True)
    connections = parts.connections(draw_subsets(x, LAYOUT, (0.3, 0.5)))

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        y = function(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *parts.parameters()])

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    expected = run(lambda x: chain(x, connections, recompute=recompute))
    torch.testing.assert_close(
        run(lambda x: checkpoint(chain, x, connections, recompute=recompute, **options)), expected
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rates", [(0.3, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str, rates: tuple[float, float], recompute: bool) -> None:
    torch.manual_seed(0)
    parts = Parts(2)
    x = torch.randn(LAYOUT.total_tokens, 6, dtype=torch.float64, requires_grad=True)
    subsets = draw_subsets(x, LAYOUT, rates)

    def block(x: Tensor, subsets: list[Subset]) -> Tensor:
        return chain(x * 2, parts.connections(subsets), recompute=recompute)

    def run(function: Callable[[Tensor, list[Subset]], Tensor]) -> tuple[Tensor, ...]:
        y = function(x, subsets)
        return y, *torch.autograd.grad(y.square().sum(), [x, *parts.parameters()])

    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(block, fullgraph=True, backend=backend)), run(block))


def test_opcheck() -> None:
    operators = torch.ops.dinov2_kernels
    C = 5
    x, grad_y = torch.randn(2, LAYOUT.total_tokens, C)
    subset, following = draw_subsets(x, LAYOUT, (0.3, 0.5))
    residual = torch.randn(subset.layout.total_tokens, C).bfloat16()
    grad_h = torch.randn(following.layout.total_tokens, C).bfloat16()
    p = torch.randn(C)
    forward = (x, residual, subset.position, subset.scale, p, p, following.rows, following.position, p, p, 1e-6)
    torch.library.opcheck(operators.residual_scatter_gather_norm.default, (*forward, torch.bfloat16))
    y, h, mean, rstd = operators.residual_scatter_gather_norm(*forward, torch.bfloat16)
    for source in ((y, None), (None, h)):
        of_norm = (grad_h, grad_y, *source, following.rows, following.position, mean, rstd, p, p)
        for gamma, bias in ((p, p), (None, None)):
            of_scatter = (residual, subset.rows, subset.position, subset.scale, gamma, bias, torch.bfloat16)
            torch.library.opcheck(operators.residual_scatter_gather_norm_backward.default, (*of_norm, *of_scatter))


def test_bad_chains() -> None:
    x = torch.randn(LAYOUT.total_tokens, 6)
    with pytest.raises(ValueError, match="connections: expected at least one, got none"):
        residual_chain(x, LAYOUT, [])
    good = Connection(lambda h, _: h, Subset(LAYOUT))
    with pytest.raises(ValueError, match="subset: expected a subset of 23 tokens, those of x, got one of 2"):
        residual_chain(x, LAYOUT, [good, good._replace(subset=Subset(PackedLayout([(1, 2)])))])
    with pytest.raises(ValueError, match=r"gamma: expected shape \[6\], the channels of x, got \[3\]"):
        residual_chain(x, LAYOUT, [good, good._replace(gamma=torch.ones(3))])
    with pytest.raises(ValueError, match=r"branch: expected a residual of shape \[23, 6\], got \[23, 1\]"):
        residual_chain(x, LAYOUT, [good, good._replace(branch=lambda h, _: h[:, :1])])
