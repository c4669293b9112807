"""Code for the attention layers of all libraries: when their own forward must run, and norms of queries and keys.

Legend: B samples of N tokens; T = B N; H heads of width D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels._modules import is_plain, is_plain_layer_norm, is_unwatched, own_forward
from dinov2_kernels.integrations.blocks import MUST_BE_CALLED
from dinov2_kernels.integrations.swap import Accelerated

_KINDS_OF_TIMM = ("LayerNorm", "RmsNorm", "SimpleNorm")
_NORMS = {
    ("torch.nn.modules.normalization", "LayerNorm.forward"),
    ("torch.nn.modules.normalization", "RMSNorm.forward"),
    *(("timm.layers.norm", f"{kind}{dtype}.forward") for kind in _KINDS_OF_TIMM for dtype in ("", "Fp32")),
}
"""Forwards of norms whose results depend on the last dimension alone, whatever the others are."""

_SEEN: dict[type[nn.Module], Callable[..., Any] | None] = {}
"""For each class of a norm: its forward if it is one of these, else None."""

_SDPA = torch._C._nn.scaled_dot_product_attention


class AcceleratedAttention(Accelerated):
    """An attention layer on the kernels, which never store attention weights."""

    runs_on = "varlen_attention"

    def restriction(self) -> str:
        return ", but in training the library's own forward, for its attention dropout" if self.drop_rate() else ""

    def drop_rate(self) -> float:
        """The rate at which a call in training drops attention weights."""
        raise NotImplementedError

    def drops(self) -> bool:
        """Whether a call drops attention weights now."""
        return self.training and bool(self.drop_rate())


def replaced_sdpa() -> str | None:
    """A reason for a detour if a tool replaced ``F.scaled_dot_product_attention``: whoever does wants it to run."""
    return None if F.scaled_dot_product_attention is _SDPA else "F.scaled_dot_product_attention was replaced"


def watched_dropout(dropout: object) -> str | None:
    """A reason for a detour if the dropout of attention weights is a module that must see them."""
    if not isinstance(dropout, nn.Module) or is_plain(dropout, nn.Dropout):
        return None
    return f"attn_drop {MUST_BE_CALLED}"


def norm_of_heads(norm: nn.Module, samples: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """A norm of queries or keys for [T, H, D]; B and N are ``samples``.

    A norm that may look at more than one head of one token is called on the shape that it knows, [B, H, N, D].
    """
    if _is_of_last_dimension(norm):
        return norm

    def call(x: Tensor) -> Tensor:
        y: Tensor = norm(x.view(*samples, *x.shape[1:]).transpose(1, 2))
        return y.transpose(1, 2).flatten(0, 1)

    return call


def _is_of_last_dimension(norm: nn.Module) -> bool:
    cls = type(norm)
    if cls not in _SEEN:
        if torch.compiler.is_compiling():
            return is_plain_layer_norm(norm)
        forward = own_forward(cls)
        is_one = forward is not None and (forward.__module__, forward.__qualname__) in _NORMS
        _SEEN[cls] = cls.forward if is_one else None
    is_own = _SEEN[cls] is cls.forward and is_unwatched(norm)
    return is_own and len(norm.__dict__.get("normalized_shape", (1,))) == 1
