"""Triton's interpreter keeps bfloat16 as 16-bit integers: it multiplies these in a dot, and casts without rounding.

:func:`exact_bfloat16` cures both, so that kernels that compute in float32 can be tested in bfloat16 too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter multiply bfloat16 by its value, and round float32 to the nearest bfloat16, as a GPU does."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def exact_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *args)

    def rounding_cast(self: Any, x: Any, dtype: Any) -> Any:
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        values = np.asarray(x.data)
        bits = values.view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # ties to even
        return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), nearest), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", exact_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    for name in ("create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, rounding_cast)
