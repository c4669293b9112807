"""Stochastic depth under PyTorch's machinery: autocast, models in bfloat16, checkpointing, torch.compile, opcheck."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_kernels import PackedLayout, stochastic_depth
from dinov2_kernels.residual import num_kept_samples
from tests.residual.cases import MODES
from tests.tolerance import assert_at_most_twice_the_error


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_result_has_the_dtype_of_the_input_under_autocast(rate: float) -> None:
    linear = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = stochastic_depth(torch.ones(6, 4), PackedLayout([(3, 2)]), lambda h, _: linear(h), drop_rate=rate)
    assert result.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_autocast_writes_the_norm_in_its_dtype(rate: float, mode: dict[str, bool]) -> None:
    torch.manual_seed(0)
    linear, norm, gamma = nn.Linear(16, 16), nn.LayerNorm(16), nn.Parameter(torch.ones(16))
    x, seen = torch.randn(6, 16), []

    def apply(norm_of: Callable[[nn.LayerNorm], Any], dtype: torch.dtype, **mode: bool) -> tuple[Tensor, ...]:
        own_linear, own_norm = deepcopy(linear).to(dtype), deepcopy(norm).to(dtype)
        leaf, own_gamma = x.to(dtype).requires_grad_(), gamma.detach().to(dtype).requires_grad_()

        def branch(h: Tensor, _: PackedLayout) -> Tensor:
            residual = own_linear(h)
            seen.append((h.dtype, residual.dtype))
            return residual

        options: dict[str, Any] = {"gamma": own_gamma, "norm": norm_of(own_norm), **mode}
        generator = torch.Generator().manual_seed(0)
        y = stochastic_depth(
            leaf.clone(), PackedLayout([(3, 2)]), branch, drop_rate=rate, generator=generator, **options
        )
        assert y.dtype == dtype
        return y, *torch.autograd.grad(y.square().sum(), [leaf, own_linear.weight, own_norm.weight, own_gamma])

    exact = apply(lambda norm: norm, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = apply(lambda norm: lambda tokens: norm(tokens), torch.float32)  # a function, which is not fused
        results = apply(lambda norm: norm, torch.float32, **mode)
    assert seen[1:] == [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
    for name, *compared in zip(("y", "x", "linear", "norm", "gamma"), results, plain, exact, strict=True):
        # What recovers the normalised tokens from h, in bfloat16, sees them rounded: that is the price of `recompute`.
        rounding = 2**-9 * compared[-1].abs().max().item() if mode and name == "norm" else 0.0
        assert_at_most_twice_the_error(name, *compared, floor=1e-6 + rounding)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_model_in_bfloat16(mode: dict[str, bool]) -> None:
    """Norm, gamma and bias in bfloat16, too."""
    torch.manual_seed(0)
    layout, norm = PackedLayout([(6, 3)]), nn.LayerNorm(32)
    gamma, bias = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(32))
    x = torch.randn(18, 32, requires_grad=True)

    def apply(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [p.detach().to(dtype).requires_grad_() for p in (x, norm.weight, norm.bias, gamma, bias)]
        norm_copy = nn.LayerNorm(32)
        norm_copy.weight, norm_copy.bias = (nn.Parameter(leaf) for leaf in leaves[1:3])
        leaves[1:3] = [norm_copy.weight, norm_copy.bias]
        options: dict[str, Any] = {"gamma": leaves[3], "bias": leaves[4], "norm": norm_copy}
        generator = torch.Generator().manual_seed(0)
        options |= {"drop_rate": 0.4, "generator": generator}
        y = stochastic_depth(leaves[0].clone(), layout, lambda h, _: h.sin(), **options, **mode)
        results = (y, *torch.autograd.grad(y.sum(), leaves))
        assert all(result.dtype == dtype for result in results)
        return tuple(result.float() for result in results)

    torch.testing.assert_close(apply(torch.bfloat16), apply(torch.float32), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_activation_checkpointing_draws_the_same_subset(mode: dict[str, bool]) -> None:
    layout, norm, gamma = PackedLayout([(8, 3), (5, 2)]), nn.LayerNorm(4), nn.Parameter(torch.ones(4))
    x, linear = torch.randn(34, 4, requires_grad=True), nn.Linear(4, 4)

    def block(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"drop_rate": 0.5, "gamma": gamma, "norm": norm}
        return stochastic_depth(x.clone(), layout, lambda h, _: linear(h).tanh(), **options, **mode)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        y = function(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, linear.weight, gamma, norm.weight])

    torch.testing.assert_close(run(lambda x: checkpoint(block, x, use_reentrant=False)), run(block))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend: str, mode: dict[str, bool]) -> None:
    layout, norm, gamma = PackedLayout([(8, 3), (5, 2)]), nn.LayerNorm(4), nn.Parameter(torch.ones(4))
    x, linear = torch.randn(34, 4, requires_grad=True), nn.Linear(4, 4)

    def block(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"drop_rate": 0.5, "gamma": gamma, "norm": norm}
        return stochastic_depth(x * 2, layout, lambda h, _: linear(h).tanh(), **options, **mode)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        y = function(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, linear.weight, gamma, norm.weight])

    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):  # the same draw as in eager PyTorch
        torch.testing.assert_close(run(torch.compile(block, fullgraph=True, backend=backend)), run(block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
def test_opcheck(drop_rate: float, dtype: torch.dtype) -> None:
    operators = torch.ops.dinov2_kernels
    layout, C = PackedLayout([(4, 3), (3, 2)]), 5
    rows = position = scale = None
    if drop_rate:
        kept = [num_kept_samples(count, drop_rate) for count, _ in layout.runs]
        arguments = (torch.rand(1, 7), list(layout.flat_runs), kept)
        torch.library.opcheck(operators.residual_kept_rows.default, arguments)
        rows, position = operators.residual_kept_rows(*arguments)
        scale = torch.rand(len(rows))
    t = layout.total_tokens if rows is None else len(rows)
    x, grad_x = torch.randn(layout.total_tokens, C), torch.randn(layout.total_tokens, C)
    residual, grad_h = torch.randn(t, C, dtype=dtype), torch.randn(t, C, dtype=dtype)
    p = torch.randn(C)
    gathered = (x, rows, p, p, 1e-6, dtype)
    h, mean, rstd = operators.residual_gather_norm(*gathered)
    for name, values in {
        "gather_norm": [gathered, (x, rows, None, None, 1e-6, dtype)],
        "gather_norm_backward": [
            (grad_h, grad_x, x, None, rows, mean, rstd, p, p),
            (grad_h, grad_x, None, h, rows, mean, rstd, p, None),
        ],
        "scatter": [(x, residual, position, scale, p, p), (x, residual, position, scale, None, None)],
        "scatter_": [(x.clone(), residual, rows, scale, p, p), (x.clone(), residual, rows, scale, None, None)],
        "scatter_backward": [(grad_x, residual, rows, scale, p, p, dtype), (grad_x, None, rows, scale, None, p, dtype)],
    }.items():
        for value in values:
            torch.library.opcheck(getattr(operators, f"residual_{name}").default, value)
