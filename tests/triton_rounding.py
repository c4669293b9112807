"""Triton's interpreter made to round to bfloat16 as a GPU does, where it truncates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, casts from float32 to bfloat16 round to the nearest, ties to even."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_rounding(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        rounded[np.isnan(source.data)] = 0x7FC0
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_rounding)
