"""Code for the attention layers of all libraries: when their own forward must run, and norms of queries and keys.

Legend: B samples of N tokens; T = B N; H heads of width D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_kernels._modules import is_plain, is_plain_layer_norm
from dinov2_kernels.integrations.blocks import MUST_BE_CALLED
from dinov2_kernels.integrations.swap import Accelerated

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

    A norm that may do more than a LayerNorm is called on the shape that it knows, [B, H, N, D].
    """
    if is_plain_layer_norm(norm):
        return norm

    def call(x: Tensor) -> Tensor:
        y: Tensor = norm(x.unflatten(0, samples).transpose(1, 2))
        return y.transpose(1, 2).flatten(0, 1)

    return call
