"""Which samples go through a residual branch: drawn without waiting for the device, unique by construction."""

from __future__ import annotations

from operator import index
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_kernels._library import accumulation_dtype, define
from dinov2_kernels._tables import table_cache
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import reference


def _fake_kept_rows(keys: Tensor, runs: list[int], kept: list[int]) -> tuple[Tensor, Tensor]:
    counts, lengths = runs[::2], runs[1::2]
    num_rows = sum(n * length for n, length in zip(kept, lengths, strict=True))
    num_tokens = sum(n * length for n, length in zip(counts, lengths, strict=True))
    return keys.new_empty(num_rows, dtype=torch.int32), keys.new_empty(num_tokens, dtype=torch.int32)


_kept_rows = define(
    "residual_kept_rows(Tensor keys, SymInt[] runs, SymInt[] kept) -> (Tensor, Tensor)",
    reference=reference.residual_kept_rows,
    fake=_fake_kept_rows,
    triton="dinov2_kernels.residual.triton_sampling:residual_kept_rows",
).call


class Subset(NamedTuple):
    """The kept samples of a packed batch of T tokens.

    Attributes:
        layout: the kept samples, t tokens in all.
        rows: [t] int32, where they stand in the batch; None where all are kept.
        position: [T] int32, the place of each token among the kept ones, or -1; None where all are kept.
        scale: [t] float32 or float64, n / kept of the run that a token belongs to; None where all are kept.
    """

    layout: PackedLayout
    rows: Tensor | None = None
    position: Tensor | None = None
    scale: Tensor | None = None


def num_kept_samples(num_samples: int, drop_rate: float) -> int:
    """Samples of a run that go through the branch: max(1, int(n * (1 - drop_rate))), and 0 of an empty run.

    The product is truncated in floating point, as in DINOv2's code: of 90 samples at rate 0.3 it keeps 62, not 63.
    """
    # index() turns torch.compile's symbolic numbers into numbers: a graph serves one number of samples, of any length.
    return index(min(num_samples, max(1, int(num_samples * (1 - drop_rate)))))


def draw_subset(x: Tensor, layout: PackedLayout, drop_rate: float, generator: torch.Generator | None) -> Subset:
    """Draw the samples of x [T, C] to keep; with ``drop_rate`` 0 all of them, and no random number is drawn.

    Every sample gets a uniform key, and those with the smallest keys of their run are kept. The number of kept samples
    is known on the host, so nothing waits for the device, and a CUDA graph draws anew with every replay.
    """
    if drop_rate == 0.0:
        return Subset(layout)
    S = layout.num_sequences
    if generator is None:
        keys = torch.rand(S, device=x.device)  # [S]
    else:
        keys = torch.rand(S, device=generator.device, generator=generator).to(x.device)  # [S]
    # A fake tensor must not enter the cache, nor a real one a traced graph: tracers work on subclasses of Tensor.
    is_traced = torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter)
    plan = _plan if is_traced else _cached_plan
    kept_layout, scale = plan(layout, drop_rate, x.device, accumulation_dtype(x))
    rows, position = _kept_rows(keys, layout.flat_runs, kept_layout.flat_runs[::2])
    return Subset(kept_layout, rows, position, scale)


def _plan(
    layout: PackedLayout, drop_rate: float, device: torch.device, dtype: torch.dtype
) -> tuple[PackedLayout, Tensor]:
    """What does not depend on the draw: the layout of the kept samples, and their scale [t]."""
    kept_layout = PackedLayout([(num_kept_samples(count, drop_rate), length) for count, length in layout.runs])
    with torch.inference_mode(False):  # the scale is saved for backward, which an inference tensor forbids
        pieces = [torch.empty(0, device=device, dtype=dtype)]
        for (count, length), (kept, _) in zip(layout.runs, kept_layout.runs, strict=True):
            if kept * length:
                pieces.append(torch.full((kept * length,), count / kept, device=device, dtype=dtype))
        return kept_layout, torch.cat(pieces)


_cached_plan = table_cache(maxsize=128)(_plan)
