"""What the Triton kernels of several operators share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """float64 as it is, everything narrower in float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


# In float32, Triton's `/` and tl.sqrt become div.full and sqrt.approx, whose results may lie one or two numbers beside
# the nearest one. That is enough for most formulas, but x / x is then not 1, nor the root of x * x the size of x.


@triton.jit
def div_rn(x, y):
    """x / y rounded to the nearest number: ``tl.div_rn``, for float64 too."""
    return tl.div_rn(x, y) if y.dtype == tl.float32 else x / y


@triton.jit
def sqrt_rn(x):
    """The root rounded to the nearest number: ``tl.sqrt_rn``, for float64 too."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)
