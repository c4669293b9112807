"""Stochastic depth: which samples go through the branch, values, gradients, modes, bad input."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_kernels import PackedLayout, _tables, stochastic_depth
from dinov2_kernels.residual import Subset, draw_subsets, num_kept_samples, reference
from tests.residual.cases import MODES

LAYOUTS = {
    "one run": [(6, 4)],
    "two runs": [(4, 5), (7, 2)],
    "empty run, empty sequences and a lone sample": [(0, 3), (2, 0), (1, 4), (5, 2)],
}


def draw_samples(layout: PackedLayout, rate: float, generator: torch.Generator) -> list[list[int]]:
    """Per run, the samples that ``stochastic_depth`` keeps when it is given a generator in the same state."""
    rows = draw_subsets(torch.zeros(layout.total_tokens, 1), layout, [rate], generator)[0].rows
    marks = torch.zeros(layout.total_tokens, dtype=torch.int32)
    marks[slice(None) if rows is None else rows.long()] += 1
    assert marks.max() <= 1
    runs = [run.sum(dim=1) if run.numel() else run.new_zeros(len(run)) for run in layout.unpack(marks)]
    for run, (_, length) in zip(runs, layout.runs, strict=True):
        assert set(run.tolist()) <= {0, length}  # whole samples
    return [run.nonzero().flatten().tolist() for run in runs]


class MeanMixer(nn.Module):
    """A branch that mixes the tokens of a sample, so that the layout it is given matters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        means = [run.mean(dim=1, keepdim=True).expand_as(run) for run in layout.unpack(x)]
        return self.linear(x).tanh() * layout.pack(means)


@pytest.mark.parametrize(
    ("samples", "rate", "kept"),
    [
        (10, 0.5, 5),
        (10, 0.1, 9),
        (7, 0.4, 4),
        (1, 0.9, 1),
        (3, 0.99, 1),
        (0, 0.3, 0),
        (90, 0.3, 62),  # 90 * (1 - 0.3) is 62.99999999999999 in floating point; the next two likewise
        (170, 0.3, 118),
        (180, 0.3, 125),
    ],
)
def test_number_of_kept_samples(samples: int, rate: float, kept: int) -> None:
    assert num_kept_samples(samples, rate) == kept

    seen = []
    layout = PackedLayout([(samples, 2)])

    def branch(x: Tensor, sub_layout: PackedLayout) -> Tensor:
        seen.append(sub_layout.runs)
        return torch.ones_like(x)

    result = stochastic_depth(torch.zeros(2 * samples, 3), layout, branch, drop_rate=rate)
    assert seen == [((kept, 2),)]
    changed = layout.unpack(result)[0].ne(0)
    assert changed.all(dim=(1, 2)).sum() == kept == changed.any(dim=(1, 2)).sum()
    if kept:
        torch.testing.assert_close(result.max(), torch.tensor(samples / kept))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("with_gamma_and_norm", [False, True])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(
    runs: list[tuple[int, int]], with_gamma_and_norm: bool, rate: float, mode: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    layout, width = PackedLayout(runs), 6
    branch = MeanMixer(width)
    norm = nn.LayerNorm(width, dtype=torch.float64) if with_gamma_and_norm else None
    gamma = torch.randn(width, dtype=torch.float64, requires_grad=True) if with_gamma_and_norm else None
    x = torch.randn(layout.total_tokens, width, dtype=torch.float64, requires_grad=True)

    kept = draw_samples(layout, rate, torch.Generator().manual_seed(3))
    expected = reference.stochastic_depth(x, layout, branch, kept, gamma, norm)
    generator = torch.Generator().manual_seed(3)
    tokens = x.clone()  # what may be overwritten
    result = stochastic_depth(
        tokens, layout, branch, drop_rate=rate, gamma=gamma, norm=norm, generator=generator, **mode
    )
    torch.testing.assert_close(result, expected)
    assert torch.equal(tokens, result if mode.get("inplace") else x)

    direction = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    leaves = [x, branch.linear.weight] + ([gamma, norm.weight] if gamma is not None and norm is not None else [])
    expected_gradients = torch.autograd.grad(expected, leaves, direction)
    torch.testing.assert_close(torch.autograd.grad(result, leaves, direction), expected_gradients)


def test_expectation_is_the_plain_residual() -> None:
    layout = PackedLayout([(5, 1)])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    draws = [
        stochastic_depth(x, layout, lambda h, _: h.square(), drop_rate=0.4, generator=generator) for _ in range(4000)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), x + x.square(), rtol=0.05, atol=0.05)


def test_every_call_draws_anew_and_each_run_on_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = PackedLayout([(50, 1), (50, 1)])
    first, second = (draw_samples(layout, 0.5, generator) for _ in range(2))
    assert [len(run) for run in first] == [25, 25]
    assert first[0] != first[1]
    assert first[0] != second[0]


def test_the_input_is_left_alone() -> None:
    x = torch.ones(6, 2)
    for rate in (0.0, 0.5):
        stochastic_depth(x, PackedLayout([(3, 2)]), lambda h, _: h, drop_rate=rate)
    assert x.eq(1).all()


def test_rate_zero_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stochastic_depth(torch.ones(6, 2), PackedLayout([(3, 2)]), lambda h, _: h, drop_rate=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("with_norm", [False, True])
def test_gradcheck(with_norm: bool, mode: dict[str, bool]) -> None:
    layout = PackedLayout([(3, 2), (2, 1)])
    branch, norm = MeanMixer(3), nn.LayerNorm(3, dtype=torch.float64)
    torch.manual_seed(0)
    x, *vectors = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(8, 3), *[(3,)] * 4])

    def apply(x: Tensor, gamma: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            options: dict[str, Any] = {"gamma": gamma, "bias": bias, "norm": norm if with_norm else None}
            return stochastic_depth(x.clone(), layout, branch, drop_rate=0.4, generator=generator, **options, **mode)

        module = _Calls(norm, run)
        return torch.func.functional_call(module, {"norm.weight": weight, "norm.bias": norm_bias}, (x,))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(apply, (x, *vectors))


class _Calls(nn.Module):
    """Calls a function that uses a norm, so that the norm's parameters can be replaced."""

    def __init__(self, norm: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.function = norm, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_kept_rows_are_unique_sorted_and_inverted_by_position() -> None:
    layout = PackedLayout([(11, 3), (6, 4), (2, 0)])
    for seed in range(20):
        (subset,) = draw_subsets(torch.zeros(57, 1), layout, [0.4], torch.Generator().manual_seed(seed))
        assert subset.rows is not None
        assert subset.position is not None
        rows = subset.rows.long()
        assert rows.diff().gt(0).all()
        assert torch.equal(subset.position[rows], torch.arange(len(rows), dtype=torch.int32))
        assert subset.position.eq(-1).sum() == 57 - len(rows)
        assert subset.layout.runs == ((6, 3), (3, 4), (1, 0))


def test_every_sample_is_kept_equally_often() -> None:
    """Counts of single samples and of pairs are within 5 standard deviations of a uniform draw's."""
    n, draws = 8, 4000
    layout, generator = PackedLayout([(n, 1), (3, 2)]), torch.Generator().manual_seed(0)
    kept = torch.zeros(draws, n)
    for draw in kept:
        draw[draw_samples(layout, 0.4, generator)[0]] = 1
    k = num_kept_samples(n, 0.4)
    together = kept.T @ kept  # [n, n]
    for counts, p in (
        (together.diagonal(), k / n),
        (together[~torch.eye(n, dtype=torch.bool)], k * (k - 1) / (n * (n - 1))),
    ):
        assert (counts - draws * p).abs().max() <= 5 * math.sqrt(draws * p * (1 - p))


@pytest.mark.parametrize("runs", [[(4, 3)], [(7, 5), (4, 1)], [(1, 3), (33, 1)], [(0, 3), (2, 0)]], ids=str)
def test_draws_at_once_are_those_of_one_after_the_other(runs: list[tuple[int, int]]) -> None:
    """To the bit, and each is a tensor that starts at 16 bytes, as kernels and torch.compile expect."""
    layout, rates = PackedLayout(runs), [0.3, 0.0, 0.5, 0.3]
    x = torch.zeros(layout.total_tokens, 1)
    for generator, other in ((None, None), (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))):
        torch.manual_seed(5)
        together = draw_subsets(x, layout, rates, generator)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        apart = [draw_subsets(x, layout, [rate], other)[0] for rate in rates]
        assert torch.equal(state, torch.get_rng_state())
        for subset, expected in zip(together, apart, strict=True):
            assert subset.layout == expected.layout
            assert (subset.rows is None) == (expected.rows is None)
            for tensor, value in zip(subset[1:], expected[1:], strict=True):
                assert tensor is value is None or torch.equal(tensor, value)
                assert tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)
    assert together[1] == (layout, None, None, None)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_subset_that_was_drawn_before(mode: dict[str, bool]) -> None:
    layout, x, norm = PackedLayout([(5, 2)]), torch.randn(10, 4), nn.LayerNorm(4)
    (subset,) = draw_subsets(x, layout, [0.4], torch.Generator().manual_seed(0))
    expected = stochastic_depth(
        x.clone(), layout, lambda h, _: h, drop_rate=0.4, norm=norm, generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(1)
    state = torch.get_rng_state()
    result = stochastic_depth(x.clone(), layout, lambda h, _: h, subset=subset, norm=norm, **mode)
    assert torch.equal(result, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_subsets() -> None:
    layout, x = PackedLayout([(3, 2)]), torch.ones(6, 2)
    (subset,) = draw_subsets(x, layout, [0.5])
    for options in ({}, {"drop_rate": 0.5, "subset": subset}):
        with pytest.raises(ValueError, match="drop_rate, subset: expected one of the two, got"):
            stochastic_depth(x, layout, lambda h, _: h, **options)
    with pytest.raises(ValueError, match="generator: expected None with a subset"):
        stochastic_depth(x, layout, lambda h, _: h, subset=subset, generator=torch.Generator())
    (others,) = draw_subsets(torch.ones(8, 2), PackedLayout([(4, 2)]), [0.5])
    for other in (others, Subset(PackedLayout([(4, 2)]))):
        with pytest.raises(ValueError, match="subset: expected a subset of 6 tokens, those of x, got one of 8"):
            stochastic_depth(x, layout, lambda h, _: h, subset=other)
    with pytest.raises(
        TypeError, match=r"subset: expected a subset drawn for tokens in torch.float64, got a scale in torch.float32"
    ):
        stochastic_depth(x.double(), layout, lambda h, _: h, subset=subset)
    with pytest.raises(ValueError, match="subset: expected the device of x, cpu, got meta"):
        stochastic_depth(x, layout, lambda h, _: h, subset=subset._replace(position=subset.position.to("meta")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py captures a graph")
def test_no_table_is_made_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would own its memory; what was made before the capture serves within it."""
    triton_kernel = pytest.importorskip("dinov2_kernels.residual.triton_kernel")
    layout, x = PackedLayout([(7, 11), (1, 23)]), torch.zeros(100, 2)  # runs of no other test
    draws = (
        lambda: draw_subsets(x, layout, [0.5]),
        lambda: triton_kernel.residual_kept_rows(torch.rand(1, 8), layout.flat_runs, [3, 1]),
    )
    for draw in draws:
        monkeypatch.setattr(_tables, "is_capturing", lambda: True)
        with pytest.raises(
            RuntimeError, match=r"a CUDA graph is being captured.*the same call once before the capture"
        ):
            draw()
        monkeypatch.setattr(_tables, "is_capturing", lambda: False)
        draw()
        monkeypatch.setattr(_tables, "is_capturing", lambda: True)
        draw()


class _DoublingNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _with_hook(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, inputs, result: 2 * result)
    return norm


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("norm", [_with_hook(nn.LayerNorm(4)), _DoublingNorm(4), nn.Linear(4, 4), torch.tanh])
def test_a_norm_that_is_more_than_a_layer_norm_is_called(
    norm: Callable[[Tensor], Tensor], mode: dict[str, bool]
) -> None:
    layout, x = PackedLayout([(5, 2)]), torch.randn(10, 4, requires_grad=True)
    kept = draw_samples(layout, 0.4, torch.Generator().manual_seed(0))
    expected = reference.stochastic_depth(x, layout, lambda h, _: h.sin(), kept, norm=norm)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"drop_rate": 0.4, "norm": norm, "generator": generator}
    result = stochastic_depth(x.clone(), layout, lambda h, _: h.sin(), **options, **mode)
    torch.testing.assert_close(result, expected)
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (result, expected))
    torch.testing.assert_close(*gradients)


def test_in_place_of_a_view() -> None:
    """The result also stands in the tensor that x is a view of, and its gradient is right."""
    layout, norm = PackedLayout([(5, 2)]), nn.LayerNorm(4)
    x = torch.randn(5, 2, 4, requires_grad=True)

    def apply(tokens: Tensor, **mode: bool) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"drop_rate": 0.4, "norm": norm, "generator": generator}
        return stochastic_depth(tokens.flatten(0, 1), layout, lambda h, _: h.sin(), **options, **mode)

    tokens = x.clone()
    result, expected = apply(tokens, inplace=True), apply(x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(tokens.flatten(0, 1), expected)
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (tokens, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("with_norm", [False, True])
def test_in_place_of_a_leaf(with_norm: bool) -> None:
    layout, norm = PackedLayout([(3, 2)]), nn.LayerNorm(2) if with_norm else None
    leaf = torch.ones(6, 2, requires_grad=True)
    message = "inplace: expected an x that may be overwritten, got a leaf that requires a gradient"
    for x in (leaf, leaf.view(6, 2)):
        with pytest.raises(ValueError, match=message):
            stochastic_depth(x, layout, lambda h, _: h, drop_rate=0.5, norm=norm, inplace=True)
    with torch.no_grad():
        stochastic_depth(leaf, layout, lambda h, _: h, drop_rate=0.5, norm=norm, inplace=True)
    strided = torch.ones(2, 6).T
    with pytest.raises(ValueError, match=r"inplace: expected a contiguous x, got strides \(1, 6\)"):
        stochastic_depth(strided, layout, lambda h, _: h, drop_rate=0.5, norm=norm, inplace=True)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_rate: expected a number in \[0, 1\), got"):
        stochastic_depth(torch.ones(6, 2), PackedLayout([(3, 2)]), lambda h, _: h, drop_rate=rate)


def test_bad_shapes() -> None:
    layout = PackedLayout([(3, 2)])
    with pytest.raises(ValueError, match="x: expected 6 tokens, as the layout describes, got 5"):
        stochastic_depth(torch.ones(5, 2), layout, lambda h, _: h, drop_rate=0.0)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, C\], got \[6, 2, 2\]"):
        stochastic_depth(torch.ones(6, 2, 2), layout, lambda h, _: h, drop_rate=0.0)
    with pytest.raises(ValueError, match=r"branch: expected a residual of shape \[6, 2\], got \[6, 1\]"):
        stochastic_depth(torch.ones(6, 2), layout, lambda h, _: h[:, :1], drop_rate=0.0)
    for name in ("gamma", "bias"):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \[2\], the channels of x, got \[3\]"):
            stochastic_depth(torch.ones(6, 2), layout, lambda h, _: h, drop_rate=0.0, **{name: torch.ones(3)})


def test_bad_types_and_devices() -> None:
    layout, x = PackedLayout([(3, 2)]), torch.ones(6, 2)
    with pytest.raises(TypeError, match="layout: expected a PackedLayout, got list"):
        stochastic_depth(x, [(3, 2)], lambda h, _: h, drop_rate=0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        stochastic_depth(x.long(), layout, lambda h, _: h, drop_rate=0.0)
    with pytest.raises(ValueError, match="branch: expected a residual on the device of x, cpu, got meta"):
        stochastic_depth(x, layout, lambda h, _: h.to("meta"), drop_rate=0.0)
    with pytest.raises(ValueError, match="gamma: expected the device of x, cpu, got meta"):
        stochastic_depth(x, layout, lambda h, _: h, drop_rate=0.0, gamma=torch.ones(2, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # PyTorch's own error, of the norm's call
        stochastic_depth(x, layout, lambda h, _: h, drop_rate=0.0, norm=nn.LayerNorm(2, device="meta"))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), None], ids=["fused norm", "no norm"])
def test_branch_input_is_freed_before_the_scatter(norm: nn.LayerNorm | None) -> None:
    """Without gradients nobody needs it any more, and the result can have its memory."""
    inputs: list[weakref.ref[Tensor]] = []

    class AtScatter(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._opname == "residual_scatter":
                self.seen += 1
                assert inputs[0]() is None
            return func(*args, **(kwargs or {}))

    def branch(h: Tensor, _: PackedLayout) -> Tensor:
        inputs.append(weakref.ref(h))
        return h + 1

    layout = PackedLayout([(4, 3)])
    with torch.no_grad(), AtScatter() as at_scatter:
        stochastic_depth(torch.randn(12, 8), layout, branch, drop_rate=0.5, norm=norm)
    assert at_scatter.seen == 1
