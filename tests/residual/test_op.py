"""Stochastic depth: which samples go through the branch, values, gradients, compilation, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov2_kernels import PackedLayout, stochastic_depth
from dinov2_kernels.residual import num_kept_samples, reference
from dinov2_kernels.residual.sampling import draw_subset

LAYOUTS = {
    "one run": [(6, 4)],
    "two runs": [(4, 5), (7, 2)],
    "empty run, empty sequences and a lone sample": [(0, 3), (2, 0), (1, 4), (5, 2)],
}


def draw_samples(layout: PackedLayout, rate: float, generator: torch.Generator) -> list[list[int]]:
    """Per run, the samples that ``stochastic_depth`` keeps when it is given a generator in the same state."""
    rows = draw_subset(torch.zeros(layout.total_tokens, 1), layout, rate, generator).rows
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


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("with_gamma_and_norm", [False, True])
@pytest.mark.parametrize("runs", LAYOUTS.values(), ids=LAYOUTS)
def test_values_and_gradients(runs: list[tuple[int, int]], with_gamma_and_norm: bool, rate: float) -> None:
    torch.manual_seed(0)
    layout, width = PackedLayout(runs), 6
    branch = MeanMixer(width)
    norm = nn.LayerNorm(width, dtype=torch.float64) if with_gamma_and_norm else None
    gamma = torch.randn(width, dtype=torch.float64, requires_grad=True) if with_gamma_and_norm else None
    x = torch.randn(layout.total_tokens, width, dtype=torch.float64, requires_grad=True)

    kept = draw_samples(layout, rate, torch.Generator().manual_seed(3))
    expected = reference.stochastic_depth(x, layout, branch, kept, gamma, norm)
    generator = torch.Generator().manual_seed(3)
    result = stochastic_depth(x, layout, branch, drop_rate=rate, gamma=gamma, norm=norm, generator=generator)
    torch.testing.assert_close(result, expected)

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


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_result_has_the_dtype_of_the_input_under_autocast(rate: float) -> None:
    linear = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = stochastic_depth(torch.ones(6, 4), PackedLayout([(3, 2)]), lambda h, _: linear(h), drop_rate=rate)
    assert result.dtype == torch.float32


def test_gradcheck() -> None:
    layout = PackedLayout([(3, 2), (2, 1)])
    branch = MeanMixer(3)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, gamma: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return stochastic_depth(x, layout, branch, drop_rate=0.4, gamma=gamma, generator=generator)

    assert torch.autograd.gradcheck(apply, (x, gamma))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_rate: expected a number in \[0, 1\), got"):
        stochastic_depth(torch.ones(6, 2), PackedLayout([(3, 2)]), lambda h, _: h, drop_rate=rate)


def test_bad_shapes() -> None:
    layout = PackedLayout([(3, 2)])
    with pytest.raises(ValueError, match="layout describes 6 tokens, but x has 5"):
        stochastic_depth(torch.ones(5, 2), layout, lambda h, _: h, drop_rate=0.0)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, C\], got \[6, 2, 2\]"):
        stochastic_depth(torch.ones(6, 2, 2), layout, lambda h, _: h, drop_rate=0.0)
    with pytest.raises(ValueError, match=r"branch: expected a residual of shape \[6, 2\], got \[6, 1\]"):
        stochastic_depth(torch.ones(6, 2), layout, lambda h, _: h[:, :1], drop_rate=0.0)
