"""SwiGLU as users call it: values, gradients, PyTorch's machinery, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dinov2_kernels import swiglu
from dinov2_kernels.swiglu import reference, swiglu_backward_


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
    x12 = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x12)
    assert torch.autograd.gradgradcheck(swiglu, x12)


def test_strided_input_and_gradient() -> None:
    x12 = torch.randn(5, 8, 3, dtype=torch.float64, requires_grad=True)
    result, expected = swiglu(x12.transpose(1, 2)), reference.swiglu(x12.transpose(1, 2))
    torch.testing.assert_close(result, expected)
    direction = torch.randn(4, 5, 3, dtype=torch.float64).permute(1, 2, 0)
    gradients = [torch.autograd.grad(y, x12, direction) for y in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 4), (0, 8), (10,), (3, 0)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    x12 = torch.randn(shape)
    torch.library.opcheck(torch.ops.dinov2_kernels.swiglu.default, (x12,))
    grad = torch.randn(*shape[:-1], shape[-1] // 2)
    torch.library.opcheck(torch.ops.dinov2_kernels.swiglu_backward.default, (grad, x12))
    torch.library.opcheck(torch.ops.dinov2_kernels.swiglu_backward_.default, (grad, x12))


def test_compiles_into_one_graph() -> None:
    x12 = torch.randn(6, 10, requires_grad=True)

    def function(x12: torch.Tensor) -> torch.Tensor:
        return swiglu(2 * x12).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x12), function(x12))
    gradients = [torch.autograd.grad(f(x12).sum(), x12) for f in (compiled, function)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype: torch.dtype) -> None:
    """It follows a linear layer, whose result has autocast's dtype already; activations keep what they are given."""
    x12 = torch.randn(6, 10, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = swiglu(x12)
    assert y.dtype == dtype
    torch.testing.assert_close(y, swiglu(x12), rtol=0, atol=0)
    y.sum().backward()
    assert x12.grad is not None
    assert x12.grad.dtype == dtype


def test_activation_checkpointing() -> None:
    x12 = torch.randn(6, 10, requires_grad=True)
    again = checkpoint(lambda x: swiglu(x.sin()), x12, use_reentrant=False)
    gradients = [torch.autograd.grad(y.square().sum(), x12) for y in (again, swiglu(x12.sin()))]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_keeps_nothing_but_its_argument() -> None:
    kept: list[torch.Tensor] = []
    x12 = torch.randn(6, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu(x12)
    assert [x.data_ptr() for x in kept] == [x12.data_ptr()]


@pytest.mark.parametrize(
    ("x12", "error", "message"),
    [
        (torch.zeros(2, 5), ValueError, r"x12: expected a last dimension of even size, got shape \[2, 5\]"),
        (torch.zeros(()), ValueError, r"x12: expected a last dimension of even size, got shape \[\]"),
        (torch.zeros(2, 4, dtype=torch.int32), TypeError, "x12: expected a floating-point tensor, got torch.int32"),
    ],
    ids=["odd", "scalar", "integers"],
)
def test_bad_arguments(x12: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu(x12)


ZEROS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("grad", "x12", "error", "message"),
    [
        (ZEROS, torch.zeros(2, 5), ValueError, r"x12: expected a last dimension of even size, got shape \[2, 5\]"),
        (ZEROS.double(), torch.zeros(2, 8), TypeError, "grad: expected dtype and device of x12, torch.float32 on cpu"),
        (ZEROS, ZEROS, ValueError, r"grad: expected shape \[2, 2\], got \[2, 4\]"),
        (torch.zeros(4, 2).t(), torch.zeros(2, 8), ValueError, r"grad: expected a contiguous tensor, got strides"),
        (ZEROS, torch.zeros(8, 2).t(), ValueError, r"x12: expected a contiguous tensor, got strides"),
    ],
    ids=["odd", "dtype", "shape", "strided grad", "strided x12"],
)
def test_bad_arguments_of_the_backward_pass(
    grad: torch.Tensor, x12: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        swiglu_backward_(grad, x12)
