"""Code for the blocks of all libraries: a residual branch with its norm, LayerScale and stochastic depth.

Legend: B samples of N tokens of width C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_kernels._library import is_tracing
from dinov2_kernels._modules import PLAIN, is_plain_layer_norm, is_unwatched
from dinov2_kernels.integrations.swap import Accelerated
from dinov2_kernels.integrations.trial import Part, Sides, factors, gamma_name, is_drop_path, is_layer_scale
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual import Connection, draw_subsets, residual_chain

MUST_BE_CALLED = "must be called: it has a hook, or is called in another way than its class says"
"""The words of a report for a part that a fused forward would not call."""


class AcceleratedBlock(Accelerated):
    """A block whose residual branches go through :func:`dinov2_kernels.stochastic_depth`.

    LayerScale and DropPath are read but not called. So a block runs its own forward if these modules are something else
    or have a hook. All other parts are called, on tokens [B, N, C]; only a plain LayerNorm is fused.

    Attributes:
        scales, drop_paths: names of the LayerScale and DropPath modules; an Identity means that there is none.
    """

    runs_on = "stochastic_depth"
    scales: ClassVar[tuple[str, ...]] = ()
    drop_paths: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        return super().obstacle(module) or cls._parts_obstacle(module)

    @classmethod
    def _parts_obstacle(cls, module: nn.Module) -> str | None:
        parts = module._modules  # attributes of a module are slow
        for name in cls.scales:
            if not is_layer_scale(part := parts[name]):  # type: ignore[arg-type]
                return f"{name} is a {type(part).__name__}, which is no LayerScale"
        for name in cls.drop_paths:
            if not is_drop_path(part := parts[name]):  # type: ignore[arg-type]
                return f"{name} is a {type(part).__name__}, which is no DropPath"
            if not part.__dict__.get("scale_by_keep", True):
                return "its DropPath does not rescale what it keeps"
        return None

    def detour(self) -> str | None:
        if reason := super().detour() or self._parts_obstacle(self):
            return reason
        parts = self._modules
        for names in (self.scales, self.drop_paths):
            for name in names:
                if not is_unwatched(parts[name]):  # type: ignore[arg-type]
                    return f"{name} {MUST_BE_CALLED}"
        return None

    def fits(self, x: object) -> bool:
        """Whether x is tokens [B, N, C] that the factors fit, and no sample is sure to be dropped."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            return False
        parts = self._modules
        for name in self.scales:
            gamma = gamma_of(parts[name])
            if gamma is None:
                continue
            if gamma.shape != x.shape[2:] or gamma.dtype != x.dtype or type(gamma) not in PLAIN:
                return False
        return all(drop_rate(parts[name]) < 1 for name in self.drop_paths)  # type: ignore[arg-type]


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
        Connection(_on_packed(branch), subset, norm=norm_on_packed(norm, x, subset.layout), gamma=gamma_of(layer_scale))
        for (branch, norm, layer_scale, _), subset in zip(branches, subsets, strict=True)
    ]
    y = residual_chain(x.flatten(0, 1), layout, connections)  # [B N, C]
    if is_tracing():
        return layout.unpack(y)[0]  # a trace would keep the sizes of its example in _unsafe_view
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, x.shape)  # for autograd not a view, as callers expect
    return shaped


def _on_packed(branch: Callable[[Tensor], Tensor]) -> Callable[[Tensor, PackedLayout], Tensor]:
    return lambda tokens, layout: branch(layout.unpack(tokens)[0]).flatten(0, 1)


def norm_on_packed(norm: nn.Module, x: Tensor, layout: PackedLayout | None) -> Callable[[Tensor], Tensor]:
    """A norm for packed tokens [T, C]: itself if it can be fused, else a call of it on the shape that it knows.

    That shape is [B, N, C] as the layout says, or [1, T, C] without a layout.
    """
    if is_plain_layer_norm(norm) and norm.normalized_shape == x.shape[-1:]:
        return norm
    if layout is None:
        return lambda tokens: norm(tokens.unsqueeze(0)).squeeze(0)
    return lambda tokens: norm(layout.unpack(tokens)[0]).flatten(0, 1)


def gamma_of(layer_scale: nn.Module | None) -> Tensor | None:
    """The factors [C] of a LayerScale; None for an Identity."""
    if layer_scale is None or isinstance(layer_scale, nn.Identity):
        return None
    name = gamma_name(layer_scale)
    gamma: Tensor | None = layer_scale._parameters.get(name)  # attributes of a module are slow
    return getattr(layer_scale, name) if gamma is None else gamma


def drop_rate(drop_path: nn.Module) -> float:
    """The share of samples that a call of the DropPath would drop now."""
    if isinstance(drop_path, nn.Identity) or not drop_path.training:
        return 0.0
    return float(drop_path.drop_prob or 0.0)  # type: ignore[arg-type]


def in_use(*args: object, **kwargs: object) -> bool:
    """Whether any optional argument is set: not None (a mask) and not False (a switch)."""
    for argument in args:
        if argument is not None and argument is not False:
            return True
    return bool(kwargs) and in_use(*kwargs.values())


def block_parts(
    norms: tuple[str, str], attention: str, mlp: str, scales: Sequence[str], *, returns_weights: bool = False
) -> Sides:
    """Stand-ins for the parts of a block by these names, for the two sides of a trial.

    On the library's side, the parts of stochastic depth multiply by 3, so that their place in the forward counts.
    """

    def mix(x: Tensor) -> Any:
        y = x.cumsum(1).sin()
        return (y, None) if returns_weights else y

    shared = {norms[0]: Part(torch.tanh), attention: Part(mix), norms[1]: Part(torch.sin), mlp: Part(torch.exp)}
    sides = []
    for factor in (1.0, 3.0):
        of_side = dict(shared)
        for place, name in enumerate(scales):
            gamma = factors() + place
            of_side[name] = Part(gamma.mul, gamma=factor * gamma)
        sides.append(of_side)
    return sides[0], sides[1]
