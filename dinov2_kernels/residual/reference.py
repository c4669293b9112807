"""Stochastic depth over a packed batch: the definition every kernel is tested against.

Of the n samples of a run, a set K of kept ones goes through the residual branch f (DINOv2, arXiv:2304.07193, section 5,
after Huang et al., arXiv:1603.09382):

    y_i = x_i + n / |K| * gamma * f(norm(x_i))    for i in K
    y_i = x_i                                     otherwise

so that the expectation over a uniformly drawn K is the plain residual connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinov2_kernels.packing import PackedLayout

Branch = Callable[[Tensor, PackedLayout], Tensor]


def stochastic_depth(
    x: Tensor,
    layout: PackedLayout,
    branch: Branch,
    kept: Sequence[Sequence[int]],
    gamma: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x: [T, C]; kept: the samples of each run that go through the branch; gamma: [C]; returns [T, C]."""
    sequences = []
    for run, run_kept in zip(layout.unpack(x), kept, strict=True):  # run: [n, N, C]
        for i, sample in enumerate(run):
            if i in run_kept:
                residual = branch(norm(sample) if norm else sample, PackedLayout([(1, len(sample))]))  # [N, C]
                residual = residual if gamma is None else gamma * residual
                sequences.append(sample + len(run) / len(run_kept) * residual)
            else:
                sequences.append(sample)
    return torch.cat(sequences)
