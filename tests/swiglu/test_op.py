"""SwiGLU: values, gradients, bad input."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import swiglu
from dinov2_kernels.swiglu import reference


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 4), (0, 8), (10,)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    x12 = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, result = reference.swiglu(x12), swiglu(x12)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(y.sin().sum(), x12) for y in (result, expected)]
    torch.testing.assert_close(*gradients)


def test_the_first_half_is_the_gate() -> None:
    x12 = torch.tensor([-100.0, 0.0, 100.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(swiglu(x12), torch.tensor([0.0, 0.0, 400.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(dtype: torch.dtype) -> None:
    x12 = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = reference.swiglu(x12.double())
    result = swiglu(x12)
    assert result.dtype == dtype
    assert (result - exact).abs().max() <= 2 * (reference.swiglu(x12) - exact).abs().max()


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_odd_width() -> None:
    with pytest.raises(ValueError, match=r"x12: expected a last dimension of even size, got shape \[2, 5\]"):
        swiglu(torch.zeros(2, 5))
