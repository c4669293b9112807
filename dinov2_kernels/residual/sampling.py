"""Draws the samples that go through a residual branch, without repetition and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import trunc
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_kernels._autograd import leaves_pytorch
from dinov2_kernels._library import accumulation_dtype, define
from dinov2_kernels._tables import table_cache
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import reference


def _fake_kept_rows(keys: Tensor, runs: list[int], kept: list[int]) -> tuple[Tensor, Tensor]:
    counts, lengths = runs[::2], runs[1::2]
    num_runs, draws = len(counts), keys.shape[0]
    num_rows = [
        sum(n * length for n, length in zip(kept[d * num_runs : (d + 1) * num_runs], lengths, strict=True))
        for d in range(draws)
    ]
    num_tokens = sum(n * length for n, length in zip(counts, lengths, strict=True))
    sizes = (sum(_with_gaps(numbers)) for numbers in (num_rows, [num_tokens] * draws))
    rows, position = (keys.new_empty(size, dtype=torch.int32) for size in sizes)
    return rows, position


_kept_rows = define(
    "residual_kept_rows(Tensor keys, SymInt[] runs, SymInt[] kept) -> (Tensor, Tensor)",
    reference=reference.residual_kept_rows,
    fake=_fake_kept_rows,
    triton="dinov2_kernels.residual.triton_kernel:residual_kept_rows",
).call


class Subset(NamedTuple):
    """The kept samples of a packed batch of T tokens.

    Attributes:
        layout: the kept samples, t tokens in all.
        rows: [t] int32, rows of the kept tokens in the batch; None if all are kept.
        position: [T] int32, index of each token among the kept ones, or -1 if it is dropped; None if all are kept.
        scale: [t] float32 or float64, n / kept of each token's run; None if all are kept.
    """

    layout: PackedLayout
    rows: Tensor | None = None
    position: Tensor | None = None
    scale: Tensor | None = None


def num_kept_samples(num_samples: int, drop_rate: float) -> int:
    """Number of samples of a run that go through the branch: max(1, int(n * (1 - drop_rate))), or 0 for an empty run.

    The floating-point product is truncated, as in DINOv2's code: with 90 samples and rate 0.3 it keeps 62, not 63.

    Examples:
        >>> num_kept_samples(10, 0.3), num_kept_samples(1, 0.3), num_kept_samples(0, 0.3)
        (7, 1, 0)
    """
    # One graph of torch.compile serves every number of samples: min and max would branch on it, int would fix it.
    kept: int = torch.sym_min(num_samples, torch.sym_max(1, trunc(num_samples * (1 - drop_rate))))
    return kept


def draw_subsets(
    x: Tensor, layout: PackedLayout, drop_rates: Sequence[float], generator: torch.Generator | None = None
) -> list[Subset]:
    """Draw the samples that several residual connections keep, all in one kernel launch.

    Each draw gives every sample a uniform random key, and keeps the samples with the smallest keys of each run. The
    host knows how many are kept, so nothing waits for the device, and a CUDA graph draws new samples in every replay.
    On a CPU, the random numbers are the same as in separate draws.

    Args:
        x: the tokens that the subsets are for, or any tensor with their device and accumulation dtype.
        layout: the samples.
        drop_rates: share of samples to drop in each draw. A rate of 0 keeps all samples and draws no random numbers.
        generator: source of the keys; the device's global PyTorch generator by default.

    Returns:
        One subset for each rate.

    Raises:
        ValueError: a rate is not in [0, 1).
        RuntimeError: a CUDA graph is being captured, and no call before had this layout and these rates.
        NotImplementedError: ``torch.jit.trace`` or an ONNX export is recording this call.

    Examples:
        >>> layout = PackedLayout([(4, 5), (8, 2)])  # four samples of 5 tokens, then eight of 2
        >>> x = torch.randn(layout.total_tokens, 16)
        >>> first, second = draw_subsets(x, layout, [0.5, 0.0])
        >>> first.layout
        PackedLayout(runs=((2, 5), (4, 2)))
        >>> first.rows.shape, first.position.shape
        (torch.Size([18]), torch.Size([36]))
        >>> second.rows is None  # all are kept
        True
    """
    for rate in drop_rates:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_rate: expected a number in [0, 1), got {rate}")
    rates = tuple(rate for rate in drop_rates if rate)
    if not rates:
        return [Subset(layout)] * len(drop_rates)
    if leaves_pytorch():
        raise NotImplementedError(
            "stochastic depth: expected a model in eval mode for torch.jit.trace and ONNX export, got one in training"
            f" mode with drop rate {rates[0]}; call model.eval() first, or use torch.export"
        )
    size = len(rates), layout.num_sequences
    if generator is None:
        keys = torch.rand(size, device=x.device)  # [draws, S]
    else:
        keys = torch.rand(size, device=generator.device, generator=generator).to(x.device)  # [draws, S]
    # The cache must hold no fake tensor, and a traced graph no real one. Tracers work on subclasses of Tensor.
    is_traced = torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter)
    plan = (_plan if is_traced else _cached_plan)(layout, rates, x.device, accumulation_dtype(x))
    rows, position = _kept_rows(keys, layout.flat_runs, plan.kept)
    if len(drop_rates) == 1:  # nothing to split: splitting would take longer than the draw
        return [Subset(plan.layouts[0], rows, position, plan.scales[0])]
    if is_traced:
        pieces = _without_gaps(rows, plan.row_sizes), _without_gaps(position, plan.position_sizes)
    else:
        pieces = rows.split_with_sizes(plan.row_sizes)[::2], position.split_with_sizes(plan.position_sizes)[::2]
    draws = map(Subset, plan.layouts, *pieces, plan.scales)
    return [next(draws) if rate else Subset(layout) for rate in drop_rates]


class _Plan(NamedTuple):
    """The part of several draws that is not random.

    Attributes:
        layouts: the kept samples of each draw.
        scales: scale [t] of each draw.
        kept: number of kept samples in each run, draw by draw.
        row_sizes, position_sizes: how to split the results: size of the first draw, gap, size of the second, and so on.
    """

    layouts: tuple[PackedLayout, ...]
    scales: tuple[Tensor, ...]
    kept: tuple[int, ...]
    row_sizes: list[int]
    position_sizes: list[int]


def _plan(layout: PackedLayout, rates: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> _Plan:
    of_rate = {rate: _plan_of_a_rate(layout, rate, device, dtype) for rate in dict.fromkeys(rates)}
    layouts, scales = zip(*(of_rate[rate] for rate in rates), strict=True)
    return _Plan(
        layouts,
        scales,
        tuple(count for kept in layouts for count in kept.flat_runs[::2]),
        _with_gaps([kept.total_tokens for kept in layouts]),
        _with_gaps([layout.total_tokens] * len(rates)),
    )


def _plan_of_a_rate(
    layout: PackedLayout, drop_rate: float, device: torch.device, dtype: torch.dtype
) -> tuple[PackedLayout, Tensor]:
    """The layout of the kept samples, and their scale [t]."""
    kept_layout = PackedLayout([(num_kept_samples(count, drop_rate), length) for count, length in layout.runs])
    with torch.inference_mode(False):  # autograd saves the scale for backward, which it refuses for inference tensors
        pieces = [torch.empty(0, device=device, dtype=dtype)]
        for (count, length), (kept, _) in zip(layout.runs, kept_layout.runs, strict=True):
            if kept * length:
                pieces.append(torch.full((kept * length,), count / kept, device=device, dtype=dtype))
        return kept_layout, torch.cat(pieces)


def _with_gaps(sizes: Sequence[int]) -> list[int]:
    """The sizes, and between two sizes the gap that makes the first a multiple of 4."""
    return [n for size in sizes for n in (size, -size % 4)][:-1]


def _without_gaps(numbers: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """The draws as ``split_with_sizes(sizes)[::2]`` returns them. A tensor for a gap would fix its size in a graph."""
    starts = list(accumulate(sizes, initial=0))
    return [numbers.narrow(0, start, size) for start, size in zip(starts[:-1:2], sizes[::2], strict=True)]


_cached_plan = table_cache(maxsize=128)(_plan)
