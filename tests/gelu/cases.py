"""What the tests of every backend of GELU share: inputs, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels.gelu import reference
from tests.tolerance import assert_at_most_twice_the_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """z of this shape [..., H]: normal, times `spread`; `offset` elements past a 16-byte boundary."""

    shape: tuple[int, ...]
    spread: float = 1.0
    offset: int = 0
    tanh: bool = False

    def __str__(self) -> str:
        spread = f"-spread{self.spread:g}" * (self.spread != 1)
        return "x".join(map(str, self.shape)) + spread + "-unaligned" * (self.offset > 0) + "-tanh" * self.tanh

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The gradient of gelu(z), and z, both [..., H]."""
        generator = torch.Generator(device).manual_seed(sum(self.shape))
        grad, z = torch.randn(2, *self.shape, dtype=torch.float64, device=device, generator=generator)
        z = (z * self.spread).clamp(-3e4, 3e4)  # float16 has to hold what becomes of it
        return self._place(grad, dtype, device), self._place(z, dtype, device)

    def _place(self, values: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        storage = torch.empty(self.offset + values.numel(), dtype=dtype, device=device)
        return storage[self.offset :].view(values.shape).copy_(values)


CASES = (
    Case((0, 8)),
    Case((3, 0)),
    Case((1,)),
    Case((1, 1)),
    Case((10,), spread=30.0),
    Case((7, 3), tanh=True),
    Case((5, 37)),  # rows that are not aligned
    Case((2, 3, 331), tanh=True),
    Case((3, 1024)),
    Case((3, 1024), offset=1),
    Case((4, 1024), spread=3.0, tanh=True),
    Case((2, 1536), spread=1e4),
    Case((2, 1536), spread=1e4, tanh=True),
    Case((2, 4099)),
    Case((1031, 6)),  # more rows than programs take at once
)


def assert_matches_reference(gelu_backward_: Any, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """``gelu_backward_`` of ``torch.ops.dinov2_kernels``, or of a module: all three results."""
    grad, z = case.tensors(dtype, device)
    exact = list_results(reference.gelu_backward_, grad.double(), z.double(), case.tanh)
    plain = list_results(reference.gelu_backward_, grad.clone(), z, case.tanh)
    result = list_results(gelu_backward_, grad, z, case.tanh)
    dtypes = (dtype, dtype, torch.promote_types(dtype, torch.float32))
    for name, got, other, right, expected in zip(("h", "dz", "sum"), result, plain, exact, dtypes, strict=True):
        assert got.dtype == expected, f"{name}: {got.dtype}, expected {expected}"
        assert not got.isnan().any(), f"{name}: NaN, or an element that was never written"
        largest = float(right.abs().max()) if right.numel() else 0.0
        floor = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (1 + largest)
        assert_at_most_twice_the_error(name, got, other, right, floor)


def list_results(gelu_backward_: Any, grad: Tensor, z: Tensor, tanh: bool) -> list[Tensor]:
    """gelu(z), the gradient of z, and its sum."""
    h, dz_sum = gelu_backward_(grad, z, tanh)
    return [h, grad, dz_sum]


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: the width of ViT-L, and an odd one."""
    from dinov2_kernels.gelu import triton_kernel

    for dtype in DTYPES:
        for H in (4096, 4099):
            for tanh in (False, True):
                z = torch.empty(32896, H, dtype=dtype, device="meta")
                yield triton_kernel.gelu_backward_(torch.empty_like(z), z, tanh)
