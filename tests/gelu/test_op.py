"""GELU's backward pass as the feed-forward layer calls it: values, PyTorch's machinery, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_kernels.gelu import gelu_backward_

SHAPES = [(7, 6), (2, 3, 4), (0, 8), (10,), (3, 0)]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_pytorch(shape: tuple[int, ...], approximate: str) -> None:
    grad, z = torch.randn(2, *shape, dtype=torch.float64)
    expected = torch.ops.aten.gelu_backward(grad, z, approximate=approximate)
    h, dz_sum = gelu_backward_(grad, z, approximate=approximate)
    torch.testing.assert_close(h, F.gelu(z, approximate=approximate))
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(dz_sum, expected[None].flatten(0, -2).sum(dim=0))


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_opcheck(shape: tuple[int, ...], tanh: bool) -> None:
    torch.library.opcheck(
        torch.ops.dinov2_kernels.gelu_backward_.default, (torch.randn(shape), torch.randn(shape), tanh)
    )


def test_compiles_into_one_graph() -> None:
    grad, z = torch.randn(2, 6, 10)

    def function(grad: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grad = 2 * grad
        h, dz_sum = gelu_backward_(grad, z)
        return h, grad.sin(), dz_sum

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grad, z), function(grad, z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype: torch.dtype) -> None:
    grad, z = torch.randn(2, 6, 10).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, dz_sum = gelu_backward_(grad, z)
    assert h.dtype == grad.dtype == dtype
    assert dz_sum.dtype == torch.float32


ZEROS = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("grad", "z", "approximate", "error", "message"),
    [
        (ZEROS, ZEROS, "erf", ValueError, "approximate: expected 'none' or 'tanh', got 'erf'"),
        (ZEROS.int(), ZEROS.int(), "none", TypeError, "z: expected a floating-point tensor, got torch.int32"),
        (ZEROS[0, 0], ZEROS[0, 0], "none", ValueError, r"z: expected shape \[..., H\], got \[\]"),
        (ZEROS.double(), ZEROS, "none", TypeError, "grad: expected dtype and device of z, torch.float32 on cpu, got"),
        (ZEROS[:1], ZEROS, "none", ValueError, r"grad: expected the shape of z, \[2, 4\], got \[1, 4\]"),
        (torch.zeros(4, 2).t(), ZEROS, "none", ValueError, r"grad: expected a contiguous tensor, got strides \(1, 2\)"),
        (ZEROS, torch.zeros(4, 2).t(), "none", ValueError, r"z: expected a contiguous tensor, got strides \(1, 2\)"),
    ],
    ids=["approximate", "integers", "scalar", "dtype", "shape", "strided grad", "strided z"],
)
def test_bad_arguments(
    grad: torch.Tensor, z: torch.Tensor, approximate: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gelu_backward_(grad, z, approximate=approximate)
