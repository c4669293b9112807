"""Attention on a GPU over a batch of crops in bfloat16: the public function beside its peers, in turns with SDPA.

Prediction for an H200 (4.3 TB/s, 790 TFLOP/s), in ns per sequence and head of 64 columns:

- 50 tokens: a program of up to 64 tokens moves each byte once. Forward takes 8 to 9 and backward 15 to 17. Peers use
  tiles of 128 rows and take 13 and 36.
- 257 tokens: forward takes 45 to 60 (floor 31), peers 77 to 118. Backward takes 180 to 190 (floor 61), peers 205,
  because seven matrix products run instead of five, and a fifth block of 64 rows holds a single row.
- 1374 tokens and more: a plain flash loop. It is 1.2 to 1.4 times as slow as cuDNN in the forward, and in the backward
  up to 7/5 slower than peers that add up gradients of queries by atomics.

The floor of a run of S sequences of N tokens and H heads is the longer time of memory and of matrix units. For each of
S H, they need 8 N D bytes and 4 N^2 D operations forward, and 16 N D bytes and 10 N^2 D operations backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import dinov2_kernels as dk
from benchmarks import gpu
from dinov2_kernels import PackedLayout

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

D = 64

LAYOUTS = {
    "crops": PackedLayout([(128, 257), (512, 50)]),
    "crops with registers": PackedLayout([(128, 261), (512, 53)]),
    "global crops": PackedLayout([(128, 257)]),
    "local crops": PackedLayout([(512, 50)]),
    "high resolution": PackedLayout([(16, 1374)]),
}

Function = Callable[[Tensor], Tensor]


def ours(layout: PackedLayout) -> Function:
    return lambda qkv: dk.varlen_attention_qkvpacked(qkv, layout)


def ours_with_offsets(layout: PackedLayout) -> Function:
    offsets = layout.cu_seqlens("cuda")
    return lambda qkv: dk.varlen_attention_qkvpacked(qkv, offsets)


def sdpa(layout: PackedLayout, backend: str) -> Function:
    """One call for each run of equal lengths, on views."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(qkv: Tensor) -> Tensor:
        results = []
        with sdpa_kernel(getattr(SDPBackend, backend)):
            for x in layout.unpack(qkv):  # [S, N, 3, H, D]
                q, k, v = x.permute(2, 0, 3, 1, 4)  # [S, H, N, D]
                results.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.cat(results)

    return run


def torch_varlen(layout: PackedLayout) -> Function:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = layout.cu_seqlens("cuda"), layout.max_length
    return lambda qkv: varlen_attn(*qkv.unbind(1), offsets, offsets, longest, longest)


def flex(layout: PackedLayout) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(layout.lengths, device="cuda")
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), lengths)  # [T]
    T = layout.total_tokens
    torch._dynamo.reset()  # its limit of recompilations would make the next mask fall back to eager
    mask = torch.compile(create_block_mask)(lambda b, h, i, j: sequence[i] == sequence[j], None, None, T, T)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, T, D]
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return run


def nested(layout: PackedLayout) -> Function:
    offsets, longest = layout.cu_seqlens("cuda").long(), layout.max_length

    def run(qkv: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=longest).transpose(1, 2)
            for x in qkv.unbind(1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    return run


def flash_attention_4(layout: PackedLayout) -> Function:
    flash = importlib.import_module("flash_attn.cute")
    offsets, longest = layout.cu_seqlens("cuda"), layout.max_length
    lengths = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def run(qkv: Tensor) -> Tensor:
        result = flash.flash_attn_varlen_func(*qkv.unbind(1), **lengths)
        return result[0] if isinstance(result, tuple) else result

    return run


PEERS: dict[str, Callable[[PackedLayout], Function]] = {
    "varlen_attention": ours,
    "varlen_attention, offsets": ours_with_offsets,
    "SDPA flash": lambda layout: sdpa(layout, "FLASH_ATTENTION"),
    "SDPA cuDNN": lambda layout: sdpa(layout, "CUDNN_ATTENTION"),
    "varlen_attn": torch_varlen,
    "flex_attention": flex,
    "nested SDPA": nested,
    "flash-attn-4": flash_attention_4,
}


QUICK = ("varlen_attention", "varlen_attention, offsets", "SDPA cuDNN", "varlen_attn")
SLOW = ("flex_attention", "nested SDPA", "flash-attn-4")  # each compiles for seconds, so each runs one case

NANOSECONDS = {50: (8.5, 16.0), 53: (9.0, 17.0), 257: (50.0, 185.0), 261: (50.0, 185.0), 1374: (1250.0, 3800.0)}
"""Predicted time for a sequence of this length and one head, forward and backward, before any GPU had run it."""


def floor_seconds(layout: PackedLayout, heads: int, backward: bool) -> float:
    """The time of memory or of matrix units, whichever is longer, summed over runs of equal lengths."""

    def of_run(count: int, length: int, per_element: int, per_score: int) -> float:
        return count * heads * gpu.floor_seconds(per_element * length * D, per_score * length * length * D)

    forward = sum(of_run(*run, 8, 4) for run in layout.runs)
    return forward + (sum(of_run(*run, 16, 10) for run in layout.runs) if backward else 0.0)


def predicted_seconds(layout: PackedLayout, heads: int, backward: bool) -> float:
    """The time by :data:`NANOSECONDS`."""
    return 1e-9 * sum(count * heads * sum(NANOSECONDS[length][: 1 + backward]) for count, length in layout.runs)


def cases() -> list[Any]:
    """Layout, heads and peer. Peers that compile for seconds run one case each."""
    slow = [pytest.param("crops", 16, peer, marks=pytest.mark.slow_to_build) for peer in SLOW]
    return [
        *((layout, 16, peer) for layout in LAYOUTS for peer in QUICK),
        *(("crops", 6, peer) for peer in QUICK),
        *slow,
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("name", "heads", "peer"), cases())
def test_attention(
    benchmark: BenchmarkFixture, compare: Compare, name: str, heads: int, backward: bool, peer: str
) -> None:
    layout = LAYOUTS[name]
    what = "forward and backward" if backward else "forward"
    benchmark.group = f"attention over {layout.runs}, {heads} heads, {what}, in a CUDA graph, speedup over SDPA flash"
    generator = torch.Generator("cuda").manual_seed(0)
    size = (layout.total_tokens, 3, heads, D)
    qkv = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_(backward)
    grad = torch.randn((size[0], *size[2:]), device="cuda", dtype=torch.bfloat16, generator=generator)

    def step(function: Function) -> Callable[[], object]:
        return gpu.as_graph(
            (lambda: torch.autograd.grad(function(qkv), qkv, grad)) if backward else (lambda: function(qkv))
        )

    baseline = PEERS["SDPA flash"](layout)
    is_ours = peer.startswith("varlen_attention")
    try:
        function = PEERS[peer](layout)
        result = function(qkv)
        own = step(function)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        if is_ours:
            raise
        pytest.skip(f"{peer}: {type(error).__name__}: {str(error)[:200]}")
    torch.testing.assert_close(result, baseline(qkv), atol=2e-2, rtol=2e-2)
    compare(
        own,
        step(baseline),
        least_bytes=(24 if backward else 8) * qkv.numel() // 3,
        rounds=31,
        floor=floor_seconds(layout, heads, backward),
        predicted=predicted_seconds(layout, heads, backward) if is_ours else None,
    )
