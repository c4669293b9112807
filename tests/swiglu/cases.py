"""What the tests of every backend of SwiGLU share: inputs, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels.swiglu import reference
from tests.tolerance import assert_at_most_twice_the_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """x12 of this shape [..., 2H]: normal, the gates times `gate`; `offset` elements past a 16-byte boundary."""

    shape: tuple[int, ...]
    gate: float = 1.0
    offset: int = 0

    def __str__(self) -> str:
        gate = f"-gate{self.gate:g}" * (self.gate != 1)
        return "x".join(map(str, self.shape)) + gate + "-unaligned" * (self.offset > 0)

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The gradient of the result [..., H], and x12 [..., 2H]."""
        options: Any = {"dtype": torch.float64, "device": device}
        options["generator"] = torch.Generator(device).manual_seed(sum(self.shape))
        x12 = torch.randn(self.shape, **options)
        grad, value = torch.randn(2, *x12.chunk(2, dim=-1)[0].shape, **options)
        gate = (x12.chunk(2, dim=-1)[0] * self.gate).clamp(-1e4, 1e4)  # float16 has to hold what becomes of it
        return self._place(grad, dtype, device), self._place(torch.cat([gate, value], dim=-1), dtype, device)

    def _place(self, values: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        storage = torch.empty(self.offset + values.numel(), dtype=dtype, device=device)
        return storage[self.offset :].view(values.shape).copy_(values)


CASES = (
    Case((0, 8)),
    Case((3, 0)),
    Case((2,)),
    Case((1, 2)),
    Case((10,), gate=100.0),
    Case((7, 6)),
    Case((5, 2 * 37)),  # halves that are not aligned
    Case((2, 3, 2 * 331)),
    Case((3, 2 * 1024)),
    Case((3, 2 * 1024), offset=1),
    Case((2, 2 * 1536), gate=1e4),
    Case((2, 2 * 4099)),
)


def assert_matches_reference(operators: Any, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """``operators.swiglu`` and ``operators.swiglu_backward``: of ``torch.ops.dinov2_kernels``, or of a module."""
    grad, x12 = case.tensors(dtype, device)
    for name, arguments in {"swiglu": (x12,), "swiglu_backward": (grad, x12)}.items():
        definition = getattr(reference, name)
        plain, exact = definition(*arguments), definition(*(x.double() for x in arguments))
        result = getattr(operators, name)(*arguments)
        assert result.dtype == dtype, f"{name}: {result.dtype}, expected {dtype}"
        assert not result.isnan().any(), f"{name}: NaN, or an element that was never written"
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        floor = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (1 + largest)
        assert_at_most_twice_the_error(name, result, plain, exact, floor)


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: the width of ViT-g/14, and an odd one."""
    from dinov2_kernels.swiglu import triton_kernel

    for dtype in DTYPES:
        for H in (4096, 4099):
            x12 = torch.empty(32896, 2 * H, dtype=dtype, device="meta")
            yield triton_kernel.swiglu(x12)
            yield triton_kernel.swiglu_backward(x12[:, :H].contiguous(), x12)
