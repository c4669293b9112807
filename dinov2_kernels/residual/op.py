"""Stochastic depth as users call it: draws the kept samples, gathers them, and adds their residual back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual.reference import Branch


def stochastic_depth(
    x: Tensor,
    layout: PackedLayout,
    branch: Branch,
    *,
    drop_rate: float,
    gamma: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Residual connection whose branch sees only a random subset of the samples, so that dropping one saves its work.

    Of the n samples of each run, ``num_kept_samples(n, drop_rate)`` are drawn uniformly; their residual is scaled by
    n / kept and added, the other samples pass unchanged; see :mod:`dinov2_kernels.residual.reference`. With
    ``drop_rate`` 0 it is the plain residual ``x + gamma * branch(norm(x))`` and draws nothing.

    Args:
        x: [T, C] packed tokens.
        layout: the samples of x.
        branch: ``branch(packed_subset, sub_layout)`` returns the residual [T', C] of the packed subset [T', C].
        drop_rate: share of the samples to drop, 0 <= drop_rate < 1.
        gamma: [C] LayerScale of the residual (arXiv:2103.17239).
        norm: applied to the subset before the branch.
        generator: source of the subset; PyTorch's global one by default.

    Returns:
        [T, C] in the dtype of x.

    Raises:
        ValueError: x, the residual or ``drop_rate`` is not as described.
    """
    layout.check(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [T, C], got {list(x.shape)}")
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"drop_rate: expected a number in [0, 1), got {drop_rate}")
    if drop_rate == 0.0:
        return _add(x, _residual(x, layout, branch, gamma, norm))
    return _add_to_subset(x, layout, branch, drop_rate, gamma, norm, generator)


def num_kept_samples(num_samples: int, drop_rate: float) -> int:
    """Samples of a run that go through the branch: max(1, int(n * (1 - drop_rate))), and 0 of an empty run.

    The product is truncated in floating point, as in DINOv2's code: of 90 samples at rate 0.3 it keeps 62, not 63.
    """
    return min(num_samples, max(1, int(num_samples * (1 - drop_rate))))


def draw_kept_samples(
    layout: PackedLayout, drop_rate: float, generator: torch.Generator | None, device: torch.device
) -> list[Tensor]:
    """Per run, the int64 indices [kept] of its kept samples."""
    source = device if generator is None else generator.device
    return [
        torch.randperm(count, generator=generator, device=source)[: num_kept_samples(count, drop_rate)].to(device)
        for count, _ in layout.runs
    ]


def _add_to_subset(
    x: Tensor,
    layout: PackedLayout,
    branch: Branch,
    drop_rate: float,
    gamma: Tensor | None,
    norm: Callable[[Tensor], Tensor] | None,
    generator: torch.Generator | None,
) -> Tensor:
    kept = draw_kept_samples(layout, drop_rate, generator, x.device)
    runs = layout.unpack(x)  # [n, N, C] each
    subset = [run.index_select(0, index) for run, index in zip(runs, kept, strict=True)]  # [kept, N, C] each
    sub_layout = PackedLayout([(len(index), length) for index, (_, length) in zip(kept, layout.runs, strict=True)])
    residual = _residual(sub_layout.pack(subset), sub_layout, branch, gamma, norm)
    return layout.pack(
        [
            _scatter(run, index, part)
            for run, index, part in zip(runs, kept, sub_layout.unpack(residual.to(x.dtype)), strict=True)
        ]
    )


def _scatter(run: Tensor, index: Tensor, residual: Tensor) -> Tensor:
    """Add the scaled residual [kept, N, C] to the kept samples of run [n, N, C]."""
    return run if len(index) == 0 else run.index_add(0, index, residual, alpha=len(run) / len(index))


def _residual(
    subset: Tensor,
    layout: PackedLayout,
    branch: Branch,
    gamma: Tensor | None,
    norm: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    residual = branch(subset if norm is None else norm(subset), layout)
    if residual.shape != subset.shape:
        raise ValueError(f"branch: expected a residual of shape {list(subset.shape)}, got {list(residual.shape)}")
    return residual if gamma is None else residual * gamma


def _add(x: Tensor, residual: Tensor) -> Tensor:
    return x + residual.to(x.dtype)
