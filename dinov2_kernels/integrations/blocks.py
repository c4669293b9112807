"""Code for the blocks of all libraries: a residual branch with its norm, LayerScale and stochastic depth.

Legend: B samples of N tokens of width C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_kernels._library import is_tracing
from dinov2_kernels._modules import is_unwatched
from dinov2_kernels.integrations.swap import Accelerated
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import Connection, draw_subsets, residual_chain

DROPPED_IN_TRAINING = ", but in training the library's own forward, for its attention dropout"
"""The words that a report adds for an attention with dropout of its weights."""


class AcceleratedBlock(Accelerated):
    """A block whose residual branches go through :func:`dinov2_kernels.stochastic_depth`.

    LayerScale and DropPath are read but not called. So a block runs its own forward if these modules are something else
    or have a hook.

    Attributes:
        scales, drop_paths: names of the LayerScale and DropPath modules; an Identity means that there is none.
    """

    runs_on = "stochastic_depth"
    scales: ClassVar[tuple[str, ...]] = ()
    drop_paths: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        if reason := super().obstacle(module):
            return reason
        for names, kind in ((cls.scales, "LayerScale"), (cls.drop_paths, "DropPath")):
            for name in names:
                if not _is_kind(part := getattr(module, name), kind):
                    return f"{name} is a {type(part).__name__}, which is no {kind}"
        if not all(_keeps_expectation(getattr(module, name)) for name in cls.drop_paths):
            return "its DropPath does not rescale what it keeps"
        return None

    def can_fuse(self, x: object) -> bool:
        """Whether x is tokens [B, N, C], and LayerScale and DropPath need not be called."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            return False
        for name in self.scales:
            if not _is_kind(part := getattr(self, name), "LayerScale") or not is_unwatched(part):
                return False
        for name in self.drop_paths:
            if not _is_kind(part := getattr(self, name), "DropPath") or not is_unwatched(part):
                return False
            if not _keeps_expectation(part) or drop_rate(part) >= 1:
                return False
        return True


class ResidualBranch(NamedTuple):
    """A branch of a block, on tokens [B, N, C], with its norm, LayerScale and drop rate."""

    branch: Callable[[Tensor], Tensor]
    norm: nn.Module
    layer_scale: nn.Module | None = None
    rate: float = 0.0


def add_branches(x: Tensor, branches: Sequence[ResidualBranch]) -> Tensor:
    """Run the branches one after the other: x + layer_scale(branch(norm(x))), with x: [B, N, C].

    With a rate above 0, a random subset of the samples goes through the branch.
    """
    layout = PackedLayout([(x.shape[0], x.shape[1])])
    subsets = draw_subsets(x, layout, [rate for *_, rate in branches])
    connections = [
        Connection(_on_packed(branch), subset, norm=norm, gamma=gamma_of(layer_scale))
        for (branch, norm, layer_scale, _), subset in zip(branches, subsets, strict=True)
    ]
    y = residual_chain(x.flatten(0, 1), layout, connections)  # [B N, C]
    if is_tracing():
        return layout.unpack(y)[0]  # a trace would keep the sizes of its example in _unsafe_view
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, x.shape)  # for autograd not a view, as callers expect
    return shaped


def _on_packed(branch: Callable[[Tensor], Tensor]) -> Callable[[Tensor, PackedLayout], Tensor]:
    return lambda tokens, layout: branch(layout.unpack(tokens)[0]).flatten(0, 1)


def gamma_of(layer_scale: nn.Module | None) -> Tensor | None:
    """The factors [C] of a LayerScale; None for an Identity."""
    if layer_scale is None or isinstance(layer_scale, nn.Identity):
        return None
    gamma: Tensor = getattr(layer_scale, "lambda1" if hasattr(layer_scale, "lambda1") else "gamma")
    return gamma


def drop_rate(drop_path: nn.Module) -> float:
    """The share of samples that a call of the DropPath would drop now."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return 0.0
    return float(drop_path.drop_prob or 0.0)  # type: ignore[arg-type]


def in_use(*args: object, **kwargs: object) -> bool:
    """Whether any optional argument is set: not None (a mask) and not False (a switch)."""
    return any(argument is not None and argument is not False for argument in (*args, *kwargs.values()))


def _is_kind(part: nn.Module, kind: str) -> bool:
    return isinstance(part, nn.Identity) or type(part).__name__.endswith(kind)


def _keeps_expectation(drop_path: nn.Module) -> bool:
    return bool(getattr(drop_path, "scale_by_keep", True))
