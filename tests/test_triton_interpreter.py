"""In the arithmetic of a GPU, float32 of the interpreter is off by what is allowed, and exact where promised."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from dinov2_kernels._triton import div_rn, sqrt_rn
from tests.triton_interpreter import ptx_arithmetic

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton's interpreter is not used")

EPS = torch.finfo(torch.float32).eps


@triton.jit
def _compute(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    tl.store(out + i, value / value)
    tl.store(out + SIZE + i, div_rn(value, value))
    tl.store(out + 2 * SIZE + i, tl.sqrt(value * value))
    tl.store(out + 3 * SIZE + i, sqrt_rn(value * value))
    tl.store(out + 4 * SIZE + i, tl.exp(value))
    tl.store(out + 5 * SIZE + i, tl.exp(value - value))
    tl.store(out + 6 * SIZE + i, tl.log(value))
    tl.store(out + 7 * SIZE + i, tl.rsqrt(value))


@triton.jit
def _multiply(a, b, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + place, tl.dot(tl.load(a + place), tl.load(b + place), input_precision="tf32x3"))


def _run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = 0.5 + 4 * torch.rand(256, dtype=dtype, generator=torch.Generator().manual_seed(0))
    out = torch.empty(8, 256, dtype=dtype)
    _compute[(1,)](x, out, SIZE=256)
    return x.double(), out.double()


def test_float32_is_off_by_what_ptx_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    x, (quotient, exact_quotient, root, exact_root, power, power_of_0, logarithm, inverse_root) = _run(torch.float32)
    for result, exact, ulps in ((quotient, 1, 2), (root, x, 2), (power, x.exp(), 8), (inverse_root, x.rsqrt(), 2)):
        error = (result / exact - 1).abs().max()
        assert EPS / 2 < error <= ulps * EPS
    assert EPS / 2 < (logarithm - x.log()).abs().max() <= 2 * EPS
    assert (exact_quotient == 1).all()
    assert (power_of_0 == 1).all()
    assert torch.equal(exact_root, x)


def test_float64_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _run(torch.float64)[1]
    ptx_arithmetic(monkeypatch)
    assert torch.equal(_run(torch.float64)[1], expected)


def test_the_same_numbers_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert torch.equal(_run(torch.float32)[1], _run(torch.float32)[1])


def test_products_in_three_parts_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are near those of float32, a thousand times nearer than one part would be, and mostly too small."""
    ptx_arithmetic(monkeypatch)
    a, b = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1))
    out = torch.empty(64, 64)
    _multiply[(1,)](a, b, out, SIZE=64)
    error = out.double() / (a.double() @ b.double()) - 1
    assert EPS < error.abs().max() < 16 * EPS
    assert (error < 0).double().mean() > 0.9
