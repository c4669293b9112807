"""What the tests of every backend share: the inputs, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels.sinkhorn import reference


class Operators(Protocol):
    """The four raw operators of one backend."""

    def sinkhorn_bias(self, logits: Tensor, temperature: float, n_iterations: int) -> Tensor: ...
    def column_logsumexp(self, logits: Tensor, temperature: float) -> Tensor: ...
    def column_mass(self, logits: Tensor, temperature: float, bias: Tensor) -> Tensor: ...
    def assign(self, logits: Tensor, temperature: float, bias: Tensor) -> Tensor: ...


def operators_of(namespace: str) -> Operators:
    """The operators that ``torch.ops`` holds under a namespace."""
    ops = getattr(torch.ops, namespace)
    return SimpleNamespace(  # type: ignore[return-value]
        sinkhorn_bias=ops.sinkhorn_bias,
        column_logsumexp=ops.sinkhorn_column_logsumexp,
        column_mass=ops.sinkhorn_column_mass,
        assign=ops.sinkhorn_assign,
    )


SCHEMAS = (
    "sinkhorn_bias(Tensor logits, float temperature, int n_iterations) -> Tensor",
    "sinkhorn_column_logsumexp(Tensor logits, float temperature) -> Tensor",
    "sinkhorn_column_mass(Tensor logits, float temperature, Tensor bias) -> Tensor",
    "sinkhorn_assign(Tensor logits, float temperature, Tensor bias) -> Tensor",
)

CUDA_THREADS = 256  # of a block, in csrc/sinkhorn/cuda.cu
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Logits [B, K], normal times magnitude; `offset` elements past a 16-byte boundary.

    The rows' means fall from 0 to `-row_spread`. Far below the others, a row has no share in any column's first sum
    that float32 could hold.
    """

    B: int
    K: int
    temperature: float = 0.07
    magnitude: float = 1.0
    offset: int = 0
    row_spread: float = 0.0

    def __str__(self) -> str:
        name = f"{self.B}x{self.K}-T{self.temperature}-{self.magnitude:g}"
        return name + f"-spread{self.row_spread:g}" * (self.row_spread > 0) + "-unaligned" * (self.offset > 0)

    def logits(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        generator = torch.Generator(device).manual_seed(self.B * 31 + self.K)
        values = torch.randn(self.B, self.K, dtype=torch.float64, device=device, generator=generator) * self.magnitude
        row_means = torch.linspace(0, -self.row_spread, self.B, dtype=torch.float64, device=device)
        values = (values.clamp(-1e4, 1e4) + row_means[:, None]).to(dtype)
        storage = torch.empty(self.offset + self.B * self.K, dtype=dtype, device=device)
        return storage[self.offset :].view(self.B, self.K).copy_(values)


CASES = (
    Case(0, 5),  # a process without samples
    Case(1, 1),
    Case(1, 37),
    Case(5, 1),
    Case(3, 8),  # one 16-byte load a row in bfloat16
    Case(6, 20),  # two and a half of them
    Case(7, 127),  # prime, odd
    Case(13, 512),
    Case(13, 512, offset=1),
    Case(37, 264, temperature=0.04, magnitude=1e4),
    Case(2, 9001, temperature=0.04, magnitude=1e4),
    Case(24, 96, row_spread=8),  # some rows at the edge of what float32 holds beside the first one
    Case(21, 130, temperature=0.04, row_spread=1e4),
)


def assert_matches_reference(operators: Operators, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Every operator: dtype and shape as defined, and an error of at most twice that of plain PyTorch in this dtype."""
    logits, T = case.logits(dtype, device), case.temperature
    exact_bias = -reference.column_logsumexp(logits.double(), T) if case.B else torch.zeros(case.K, device=device)
    bias = exact_bias.to(accumulation_dtype(logits))
    largest = 5 * case.magnitude + case.row_spread

    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("column_logsumexp", (T,)),
        ("column_mass", (T, bias)),
        ("assign", (T, bias)),
        *(("sinkhorn_bias", (T, n_iterations)) for n_iterations in (1, 2, 3)),
    ]
    for name, arguments in calls:
        define = getattr(reference, name)
        plain = define(logits, *arguments)
        exact = define(*(x.double() if isinstance(x, Tensor) else x for x in (logits, *arguments)))
        value = getattr(operators, name)(logits, *arguments)
        assert value.dtype == plain.dtype, name
        assert value.shape == plain.shape, name
        assert not value.isnan().any(), f"{name}: NaN, or an element that was never written"
        if not exact.isfinite().all():  # -inf where there are no rows
            assert torch.equal(value.double(), exact), name
        elif exact.numel() > 0:
            # In float64 the reference is no more exact than the kernel: both round x / T.
            size = largest / T if dtype == torch.float64 else exact.abs().max()
            rounding = 4 * torch.finfo(value.dtype).eps * size
            error, allowed = (value - exact).abs().max(), 2 * (plain - exact).abs().max() + rounding
            assert error <= allowed, f"{name}{arguments[1:]}: error {error:.2e}, plain PyTorch allows {allowed:.2e}"


def assert_infinite_and_missing_logits(operators: Operators, device: str = "cpu") -> None:
    """The bias where logits are -inf or NaN: a column that nobody can choose, a row that can choose none, one NaN."""
    finite = torch.randn(20, 70, generator=torch.Generator().manual_seed(9))
    for place in ((slice(None), 4), (slice(None), slice(0, 40)), (11,), (slice(None),)):
        for value in (-torch.inf, torch.nan):
            logits = finite.clone()
            logits[place] = value
            _assert_bias(operators, logits.to(device))
    finite[:, 4] = -torch.inf
    finite[3, 5] = torch.nan
    _assert_bias(operators, finite.to(device))


def _assert_bias(operators: Operators, logits: Tensor) -> None:
    for n_iterations in (1, 2, 3):
        expected = reference.sinkhorn_bias(logits, 0.07, n_iterations)
        value = operators.sinkhorn_bias(logits, 0.07, n_iterations)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles, in the shapes of pretraining."""
    from dinov2_kernels.sinkhorn import triton_kernel

    for dtype in DTYPES:
        for B in (128, 4096):
            logits = torch.empty(B, 65536, dtype=dtype, device="meta")
            bias = torch.empty(65536, dtype=accumulation_dtype(logits), device="meta")
            yield triton_kernel.sinkhorn_bias(logits, 0.07, 3)
            yield triton_kernel.column_logsumexp(logits, 0.07)
            yield triton_kernel.column_mass(logits, 0.07, bias)
            yield triton_kernel.assign(logits, 0.07, bias)
