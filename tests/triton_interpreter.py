"""Triton's interpreter computes with NumPy; what a GPU computes differs from that in two ways, which tests can ask for.

:func:`exact_bfloat16`: the interpreter keeps bfloat16 as 16-bit integers, multiplies these in a dot, and casts without
rounding. :func:`ptx_arithmetic`: its float32 is exact to the last place where a GPU's is not.

Whoever imports this module also makes the interpreter faster. Before each call of a function, it looks through all
names of Triton's language for builtins to replace; which ones these are is now found out once. It also computed each
sum, difference and product of 32-bit integers again in 64 bits, for an assertion that it makes in debug mode only, and
it has no debug mode.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from triton.language.core import is_builtin
from triton.runtime import interpreter

Float32 = npt.NDArray[np.float32]


@functools.cache
def _builtins_of(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package: Any, *arguments: Any) -> None:
    for name in _builtins_of(package):
        if is_builtin(member := getattr(package, name)):  # not yet replaced
            interpreter._patch_attr(package, name, member, *arguments)


interpreter._patch_builtin = _patch_builtin
builder = interpreter.interpreter_builder
assert not builder.options.debug
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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


def ptx_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give float32 in the interpreter the errors that it may have on a GPU.

    Each result is moved off the exact one by the largest error that its instruction may have, up or down as the bits of
    the operands say: the same operands always give the same result. The bounds are those of the PTX ISA for what Triton
    emits: div.full 2 ulp, sqrt.approx 2^-23, rsqrt.approx 2^-22.9, ex2.approx 2 ulp, after a product with log2 e that
    is rounded, for exp; and 1 ulp for log and log2, which come from NVIDIA's library. tl.div_rn and tl.sqrt_rn stay
    exact. A dot of "tf32x3" becomes three products of TF32, whose sums are truncated after every eight terms.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def ulps(count: float) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        return lambda exact: count * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)

    def relative(error: float) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        return lambda exact: error * np.abs(exact)

    def replace(name: str, function: Callable[..., Any], error: Callable[..., Any]) -> None:
        define = getattr(InterpreterBuilder, name)

        def compute(self: Any, *operands: Any) -> Any:
            if operands[0].dtype.scalar != tl.float32:
                return define(self, *operands)
            numbers = np.broadcast_arrays(*(operand.data for operand in operands))
            with np.errstate(all="ignore"):  # infinite and missing numbers, which operands may hold
                exact = function(*(x.astype(np.float64) for x in numbers))
                moved = (exact + _sign(*numbers) * error(exact)).astype(np.float32)
                nearest = exact.astype(np.float32)
            known = (nearest == 0) | ~np.isfinite(nearest)
            if name in ("create_exp", "create_exp2"):
                known |= numbers[0] == 0  # of which the result is 1
            return TensorHandle(np.where(known, nearest, moved), tl.float32)

        monkeypatch.setattr(InterpreterBuilder, name, compute)

    log2e = np.float32(1.4426950408889634)
    replace("create_fdiv", np.divide, ulps(2))
    replace("create_sqrt", np.sqrt, relative(2**-23))
    replace("create_rsqrt", lambda x: 1 / np.sqrt(x), relative(2**-22.9))
    replace("create_exp", lambda x: np.exp2((x.astype(np.float32) * log2e).astype(np.float64)), ulps(2))
    replace("create_exp2", np.exp2, ulps(2))
    replace("create_log", np.log, ulps(1))
    replace("create_log2", np.log2, ulps(1))

    create_dot = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *args: Any) -> Any:
        if precision != ir.INPUT_PRECISION.TF32x3 or a.dtype.scalar != tl.float32:
            return create_dot(self, a, b, total, precision, *args)
        (a_main, a_rest), (b_main, b_rest) = _tf32_parts(a.data), _tf32_parts(b.data)
        sums = _add_truncated(np.zeros_like(total.data), a_rest, b_main)
        sums = _add_truncated(sums, a_main, b_rest)
        return TensorHandle(total.data + _add_truncated(sums, a_main, b_main), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def _sign(*numbers: Float32) -> npt.NDArray[np.float64]:
    """1 or -1, by the bits of one or two numbers."""
    mixed = np.zeros(numbers[0].shape, np.uint64)
    for x in numbers:
        bits = np.ascontiguousarray(x, np.float32).reshape(x.shape).view(np.uint32).astype(np.uint64)
        mixed = ((mixed ^ bits) * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)
    return np.where(mixed >> np.uint64(31), 1.0, -1.0)


def _tf32_parts(x: Float32) -> tuple[Float32, Float32]:
    """The nearest number of TF32, with 10 bits after the first, and what of the rest TF32 holds."""

    def masked(x: Float32, added: int) -> Float32:
        return ((x.view(np.uint32) + np.uint32(added)) & np.uint32(0xFFFFE000)).view(np.float32)

    main = masked(np.ascontiguousarray(x), 0x1000)
    return main, masked(x - main, 0)


def _add_truncated(total: Float32, a: Float32, b: Float32) -> Float32:
    """total + a @ b, eight products at a time, each sum cut off where float32 ends."""
    for k in range(0, a.shape[1], 8):
        exact = total + np.matmul(a[:, k : k + 8], b[k : k + 8], dtype=np.float64)
        total = (exact.view(np.uint64) & np.uint64(0xFFFFFFFFE0000000)).view(np.float64).astype(np.float32)
    return total
