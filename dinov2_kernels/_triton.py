"""What the Triton kernels of several operators share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """float64 as it is, everything narrower in float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)
