"""What the tests of every backend of attention share: the inputs, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels import PackedLayout
from dinov2_kernels.attention import reference
from tests.tolerance import assert_at_most_twice_the_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Sequences of these runs (count, length), with H heads of width D; q and k are normal times magnitude."""

    runs: tuple[tuple[int, int], ...]
    H: int = 2
    D: int = 64
    magnitude: float = 1.0

    def __str__(self) -> str:
        runs = "+".join(f"{count}x{length}" for count, length in self.runs[:4]) + ("+..." if len(self.runs) > 4 else "")
        return f"{runs or 'nothing'}-H{self.H}-D{self.D}" + (f"-{self.magnitude:g}" if self.magnitude != 1 else "")

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(self.runs)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """qkv [T, 3, H, D] and the gradient of the result [T, H, D]."""
        T = self.layout.total_tokens
        options: Any = {"dtype": torch.float64, "device": device}
        options["generator"] = torch.Generator(device).manual_seed(T + self.D)
        qkv = torch.randn(T, 3, self.H, self.D, **options)
        qkv[:, :2] *= self.magnitude
        grad = torch.randn(T, self.H, self.D, **options)
        return qkv.to(dtype), grad.to(dtype)


def _ragged(lengths: list[int]) -> tuple[tuple[int, int], ...]:
    return PackedLayout.from_lengths(lengths).runs


CASES = (
    Case(()),
    Case(((3, 0),)),
    Case(((1, 1),), H=1),
    Case(((2, 2), (0, 5), (1, 0), (3, 1)), H=3),
    *(Case(((2, length),)) for length in (15, 16, 17, 49, 50, 53, 54, 63, 64, 65)),
    *(Case(((1, length),), H=1) for length in (196, 197, 201, 255, 256, 257, 261, 272, 273)),
    Case(((2, 57), (3, 13)), H=24),
    Case(_ragged([3, 0, 17, 65, 1, 64, 130, 50]), H=3),
    Case(((1, 70), (2, 20)), D=32),
    Case(((1, 70), (2, 20)), D=72),
    Case(((1, 70), (2, 20)), D=80),
    Case(((1, 70), (2, 20)), D=96),
    Case(((1, 70), (2, 20)), D=128),
    Case(((1, 19), (2, 5)), D=5),
    Case(((1, 19), (2, 5)), D=1),
    Case(((2, 50), (1, 100)), magnitude=30.0),  # scores of several thousand: one key takes all
)

LONG_CASES = (
    Case(((1, 785),), H=1),
    Case(((1, 1374),), H=1),
    Case(((200, 5), (100, 50), (130, 7)), H=1),
)


Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., Tensor]


def assert_matches_reference(
    forward: Forward, backward: Backward, case: Case, dtype: torch.dtype, device: str = "cpu", offsets: bool = False
) -> None:
    """Both raw operators of a backend, called with runs or with offsets, against float64."""
    layout = case.layout
    qkv, grad = case.inputs(dtype, device)
    scale = case.D**-0.5
    sequences = (layout.cu_seqlens(device), ()) if offsets else (None, layout.flat_runs)
    known = (None, layout.flat_runs)

    out, lse = forward(*qkv.unbind(1), *sequences, scale)
    dqkv = backward(grad, *qkv.unbind(1), out, lse, *sequences, scale)
    assert out.dtype == dqkv.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    assert dqkv.shape == qkv.shape

    exact_qkv, exact_grad = qkv.double(), grad.double()
    exact_out, exact_lse = reference.attention_forward(*exact_qkv.unbind(1), *known, scale)
    exact_dqkv = reference.attention_backward(exact_grad, *exact_qkv.unbind(1), exact_out, exact_lse, *known, scale)
    plain_lse = reference.attention_forward(*qkv.unbind(1), *known, scale)[1]
    plain_qkv = qkv.clone().requires_grad_()
    plain_out = reference.varlen_attention(*plain_qkv.unbind(1), layout.lengths, scale) if layout.lengths else out
    (plain_dqkv,) = torch.autograd.grad(plain_out, plain_qkv, grad) if layout.lengths else (dqkv,)

    floor = 4e-6 * case.magnitude**2
    assert_at_most_twice_the_error("out", out, plain_out, exact_out, floor)
    assert_at_most_twice_the_error("lse", lse, plain_lse, exact_lse, floor)
    for index, name in enumerate(("dq", "dk", "dv")):
        result, plain, exact = (x[:, index] for x in (dqkv, plain_dqkv, exact_dqkv))
        assert_at_most_twice_the_error(name, result, plain, exact, floor)


WIDTHS = (64, 80, 96, 128)


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: all tiles of ViTs, in half and in single precision."""
    from dinov2_kernels.attention import triton_kernel

    for dtype, D, lengths in (
        (torch.bfloat16, 64, (16, 32, 50, 72, 128, 144, 201, 257, 1374)),
        (torch.bfloat16, 80, (50, 257)),
        (torch.bfloat16, 96, (50, 257)),
        (torch.bfloat16, 128, (50, 144, 257)),
        (torch.float16, 64, (50, 257)),
        (torch.float32, 64, (16, 32, 257)),
        *((torch.float32, D, (16, 257)) for D in (80, 96, 128)),
    ):
        known = [(None, PackedLayout([(8, length)]).flat_runs) for length in lengths]
        ragged = (None, PackedLayout.from_lengths([40, 50, 60, 300, 350, 400]).flat_runs)
        offsets = (torch.empty(9, dtype=torch.int32, device="meta"), ())
        for sequences in (*known, ragged, offsets) if (dtype, D) == (torch.bfloat16, 64) else known:
            qkv = torch.empty(4096, 3, 6, D, dtype=dtype, device="meta")
            out = torch.empty(4096, 6, D, dtype=dtype, device="meta")
            _, lse = triton_kernel.attention_forward(*qkv.unbind(1), *sequences, 0.125)
            yield triton_kernel.attention_backward(out, *qkv.unbind(1), out, lse, *sequences, 0.125)
