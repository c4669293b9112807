"""SwiGLU as users call it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(x12: Tensor) -> Tensor:
    """Gate one half of the features by the SiLU of the other, see :mod:`dinov2_kernels.swiglu.reference`.

    Bytes: one read of x12 and one write of the result, which is half as large.

    Args:
        x12: [..., 2H] gate (first half) and value (second half); any floating dtype.

    Returns:
        [..., H] in the dtype of x12.

    Raises:
        ValueError: the last dimension is odd.
    """
    if x12.dim() == 0 or x12.shape[-1] % 2:
        raise ValueError(f"x12: expected a last dimension of even size, got shape {list(x12.shape)}")
    gate, value = x12.chunk(2, dim=-1)
    return F.silu(gate) * value
