"""Stochastic depth as users call it: draws the kept samples, gathers them, and adds their residual back.

:func:`residual_chain` does this for several connections in a row, as in a transformer block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from dinov2_kernels._autograd import base_of, is_of_a_leaf
from dinov2_kernels._library import accumulation_dtype, contiguous
from dinov2_kernels._modules import is_plain_layer_norm
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual.op import gather_norm, scatter_add, scatter_gather_norm
from dinov2_kernels.residual.reference import Branch
from dinov2_kernels.residual.sampling import Subset, draw_subsets


def stochastic_depth(
    x: Tensor,
    layout: PackedLayout,
    branch: Branch,
    *,
    drop_rate: float | None = None,
    subset: Subset | None = None,
    gamma: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    inplace: bool = False,
    recompute: bool = False,
) -> Tensor:
    """Residual connection whose branch computes only a random subset of the samples: dropped samples cost nothing.

    For each run of n samples, ``num_kept_samples(n, drop_rate)`` are drawn uniformly. Their residual is scaled by
    n / kept and added. The other samples stay unchanged; see :mod:`dinov2_kernels.residual.reference`. With
    ``drop_rate`` 0 it is the plain residual ``x + gamma * branch(norm(x))``, without random numbers.

    An ``nn.LayerNorm`` is fused with the gather, and everything after the branch with the scatter. Elements moved, with
    m elements in the kept tokens and T C in all tokens:

    ===================  =============================================================  ==============  =============
    step                 reads and writes                                               in place        otherwise
    ===================  =============================================================  ==============  =============
    gather + LayerNorm   read x, write h                                                2 m             2 m
    scatter              read the residual, read and write x                            3 m             m + 2 T C
    scatter, backward    read the gradient and the residual, write the residual's       3 m             3 m
    gather, backward     read h's gradient and x (or h), read and write x's gradient    2 m + 2 T C     2 m + 2 T C
    ===================  =============================================================  ==============  =============

    At drop rate 0.3, T C = 1.43 m: 12.9 m in place and 13.7 m otherwise, against about 34 m for indexing, LayerNorm,
    LayerScale and ``index_add``. Backward needs only 24 more bytes per kept token.

    Args:
        x: [T, C] packed tokens.
        layout: the samples of x.
        branch: ``branch(packed_subset, sub_layout)`` returns the residual [T', C] of the packed subset [T', C].
        drop_rate: share of the samples to drop, 0 <= drop_rate < 1.
        subset: samples that were drawn before, instead of a rate: see :func:`dinov2_kernels.residual.draw_subsets`.
        gamma: [C] LayerScale of the residual (arXiv:2103.17239).
        norm: norm of the subset before the branch. Under autocast, a fused ``nn.LayerNorm`` gives its result in
            autocast's dtype.
        bias: [C] added to the residual before gamma: the bias of the branch's last linear layer, if the branch leaves
            it out. Its gradient then comes from the same pass as gamma's.
        generator: source of the subset; the device's global PyTorch generator by default.
        inplace: overwrite x, which must not be a leaf that requires a gradient; implies ``recompute``. If x is a view,
            the norm is not fused, because autograd cannot differentiate the fused norm of a view.
        recompute: keep less for backward: it recovers the normalised tokens from the norm's result, which the branch
            keeps anyway, and needs no x. A norm weight that is exactly 0 then gets no gradient.

    Returns:
        [T, C] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument or the residual is not as described.

    Examples:
        >>> layout = PackedLayout([(4, 5), (8, 2)])  # four samples of 5 tokens, then eight of 2
        >>> x = torch.zeros(layout.total_tokens, 16)
        >>> def branch(tokens, kept_layout):
        ...     print(tokens.shape, kept_layout)
        ...     return torch.ones_like(tokens)
        >>> y = stochastic_depth(x, layout, branch, drop_rate=0.5)
        torch.Size([18, 16]) PackedLayout(runs=((2, 5), (4, 2)))
        >>> y.unique()  # half of the samples stay unchanged, the residual of the others counts twice
        tensor([0., 2.])
    """
    _check(x, layout)
    if inplace:
        _check_overwritable(x)
    if drop_rate is not None and subset is None:
        (subset,) = draw_subsets(x, layout, [drop_rate], generator)
    elif drop_rate is not None or subset is None:
        raise ValueError(f"drop_rate, subset: expected one of the two, got drop_rate {drop_rate} and subset {subset}")
    elif generator is not None:
        raise ValueError(f"generator: expected None with a subset, which is already drawn, got {generator}")
    connection = Connection(branch, subset, norm, gamma, bias)
    _check_connection(connection, x)
    return _run(contiguous(x), [connection], inplace, recompute)


class Connection(NamedTuple):
    """One residual connection of :func:`residual_chain`. Its fields are arguments of :func:`stochastic_depth`."""

    branch: Branch
    subset: Subset
    norm: Callable[[Tensor], Tensor] | None = None
    gamma: Tensor | None = None
    bias: Tensor | None = None


def residual_chain(
    x: Tensor, layout: PackedLayout, connections: Sequence[Connection], *, recompute: bool = False
) -> Tensor:
    """Several residual connections in a row: the same as :func:`stochastic_depth` for each, with its subset.

    Between two connections, one pass does the scatter of the first and the gather and LayerNorm of the second; backward
    does the same. Compared with :func:`stochastic_depth` twice, this saves m elements in each direction, where m counts
    the tokens that the second connection keeps:

    ====================  ============================================================================  =============
    step                  reads and writes                                                              elements
    ====================  ============================================================================  =============
    scatter + gather      read the residual and x; write x, and h of the next connection                2 m + 2 T C
    the same, backward    read h's gradient, x (or h), the residual and the gradient of x; write those  4 m + 2 T C
                          of the residual and of x
    ====================  ============================================================================  =============

    On a CPU one call makes two passes, which move as much as :func:`stochastic_depth` twice. With dropped samples,
    backward needs 4 more bytes for each token and connection: the token's position.

    Args:
        x: [T, C] packed tokens.
        layout: the samples of x.
        connections: at least one.
        recompute: as for :func:`stochastic_depth`. The tokens between two connections are then overwritten too.

    Returns:
        [T, C] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument or a residual is not as described.

    Examples:
        >>> layout = PackedLayout([(4, 5), (8, 2)])
        >>> x = torch.randn(layout.total_tokens, 16)
        >>> first, second = draw_subsets(x, layout, [0.5, 0.5])
        >>> layer, next_layer = nn.Linear(16, 16), nn.Linear(16, 16)
        >>> connections = [
        ...     Connection(lambda tokens, kept_layout: layer(tokens), first, norm=nn.LayerNorm(16)),
        ...     Connection(lambda tokens, kept_layout: next_layer(tokens), second, norm=nn.LayerNorm(16)),
        ... ]
        >>> residual_chain(x, layout, connections).shape
        torch.Size([36, 16])
    """
    if not connections:
        raise ValueError("connections: expected at least one, got none")
    _check(x, layout)
    for connection in connections:
        _check_connection(connection, x)
    return _run(contiguous(x), connections, False, recompute)


def _run(x: Tensor, connections: Sequence[Connection], inplace: bool, recompute: bool) -> Tensor:
    kept, x = _gather(x, connections[0], inplace, recompute)
    for connection, following in pairwise(connections):
        residual = _residual(connection, kept)
        del kept  # if no backward pass needs it, the result of the scatter can use its memory
        kept, x = _scatter_gather(x, residual, connection, following, inplace, recompute)
        inplace = recompute  # from here on, nothing else holds x
    residual = _residual(connections[-1], kept)
    del kept
    _, subset, _, gamma, bias = connections[-1]
    return scatter_add(x, residual, subset, gamma, bias, inplace=inplace)


def _gather(x: Tensor, connection: Connection, inplace: bool, recompute: bool) -> tuple[Tensor, Tensor]:
    """The tokens for the branch, and x for the scatter."""
    subset, norm = connection.subset, connection.norm
    if _is_fusable(norm, x) and not (inplace and base_of(x) is not x):
        return gather_norm(x, subset, norm, inplace=inplace, recompute=recompute)
    kept = _kept(x, subset, inplace)
    return kept if norm is None else norm(kept), x


def _kept(x: Tensor, subset: Subset, inplace: bool) -> Tensor:
    """The kept tokens. If x will be overwritten, they are a copy: the branch may need them in its backward."""
    if subset.rows is not None:
        return x.index_select(0, subset.rows)
    return x.clone() if inplace else x


def _residual(connection: Connection, kept: Tensor) -> Tensor:
    residual = connection.branch(kept, connection.subset.layout)
    if residual.shape != kept.shape:
        raise ValueError(f"branch: expected a residual of shape {list(kept.shape)}, got {list(residual.shape)}")
    if residual.device != kept.device:
        raise ValueError(f"branch: expected a residual on the device of x, {kept.device}, got {residual.device}")
    return residual


def _scatter_gather(
    x: Tensor, residual: Tensor, connection: Connection, following: Connection, inplace: bool, recompute: bool
) -> tuple[Tensor, Tensor]:
    """The tokens for the following branch, and x with the residual added."""
    _, subset, _, gamma, bias = connection
    if _is_fusable(following.norm, x) and not inplace:
        next_subset, norm = following.subset, following.norm
        return scatter_gather_norm(x, residual, subset, gamma, bias, next_subset, norm, recompute=recompute)
    x = scatter_add(x, residual, subset, gamma, bias, inplace=inplace)
    return _gather(x, following, recompute, recompute)


def _check(x: Tensor, layout: PackedLayout) -> None:
    if not isinstance(layout, PackedLayout):
        raise TypeError(f"layout: expected a PackedLayout, got {type(layout).__name__}")
    layout.check(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [T, C], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")


def _check_connection(connection: Connection, x: Tensor) -> None:
    _, subset, _, gamma, bias = connection
    position, scale = subset.position, subset.scale
    tokens = subset.layout.total_tokens if position is None else position.shape[0]
    if tokens != x.shape[0]:
        raise ValueError(f"subset: expected a subset of {x.shape[0]} tokens, those of x, got one of {tokens}")
    if position is not None and position.device != x.device:
        raise ValueError(f"subset: expected the device of x, {x.device}, got {position.device}")
    if scale is not None and scale.dtype != accumulation_dtype(x):
        raise TypeError(f"subset: expected a subset drawn for tokens in {x.dtype}, got a scale in {scale.dtype}")
    for name, vector in (("gamma", gamma), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[1:]:
            raise ValueError(f"{name}: expected shape {[x.shape[1]]}, the channels of x, got {list(vector.shape)}")
        if vector.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {vector.device}")


def _check_overwritable(x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"inplace: expected a contiguous x, got strides {x.stride()}")
    if is_of_a_leaf(x):
        raise ValueError("inplace: expected an x that may be overwritten, got a leaf that requires a gradient")


def _is_fusable(norm: object, x: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether a call of the norm does nothing but a LayerNorm over the channels: no hooks, no other forward."""
    if not is_plain_layer_norm(norm) or norm.normalized_shape != x.shape[1:]:
        return False
    weight = norm.weight  # looked up once, because attributes of a module are slow
    return weight is None or weight.device == x.device  # if not, calling the norm raises PyTorch's error
