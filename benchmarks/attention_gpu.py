"""Attention on a GPU over a batch of crops in bfloat16: the public function beside its peers, in turns with SDPA.

Prediction for an H200 (4.3 TB/s, 790 TFLOP/s), in ns per sequence and head of 64 columns: a program of up to 64 tokens
moves each byte once, 7 forward and 14 backward at 50 tokens, where tiles of 128 rows cost peers 13 and 36. At 257
tokens 45 forward (floor 31) against 77 to 118; backward 150 to 190 (floor 61) against 205, because seven products of
matrices run instead of five. From 1374 tokens on it is a plain flash loop: on a par in the forward, and up to 7/5
slower in the backward than what adds up gradients of queries by atomics.

The floor of a run of S sequences of N tokens and H heads is the slower of memory and matrix units: 8 N D bytes and
4 N^2 D operations forward, 16 N D and 10 N^2 D backward, for each of S H.
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
from dinov2_kernels import PackedLayout

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

D = 64
BYTES_PER_SECOND = 4.3e12  # of an H200, as large copies reach it
OPERATIONS_PER_SECOND = 790e12  # of its matrix units in bfloat16, as large products reach it

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


def floor_seconds(layout: PackedLayout, heads: int, backward: bool) -> float:
    def slower(count: int, length: int, per_element: int, per_score: int) -> float:
        of_bytes = per_element * length * D / BYTES_PER_SECOND
        of_operations = per_score * length * length * D / OPERATIONS_PER_SECOND
        return count * heads * max(of_bytes, of_operations)

    forward = sum(slower(*run, 8, 4) for run in layout.runs)
    return forward + (sum(slower(*run, 16, 10) for run in layout.runs) if backward else 0.0)


def as_graph(function: Callable[[], Any]) -> Callable[[], None]:
    """Replay what a call launches, without what it costs the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.gpu
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("heads", [6, 16], ids=["ViT-S", "ViT-L"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_attention(
    benchmark: BenchmarkFixture,
    compare: Compare,
    layout: PackedLayout,
    heads: int,
    backward: bool,
    graph: bool,
    peer: str,
) -> None:
    what, how = "forward and backward" if backward else "forward", "in a CUDA graph" if graph else "eager"
    benchmark.group = f"attention over {layout.runs}, {heads} heads, {what}, {how}, speedup over SDPA flash"
    generator = torch.Generator("cuda").manual_seed(0)
    size = (layout.total_tokens, 3, heads, D)
    qkv = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_(backward)
    grad = torch.randn((size[0], *size[2:]), device="cuda", dtype=torch.bfloat16, generator=generator)

    def step(function: Function) -> Callable[[], object]:
        run = (lambda: torch.autograd.grad(function(qkv), qkv, grad)) if backward else (lambda: function(qkv))
        return as_graph(run) if graph else run

    baseline = PEERS["SDPA flash"](layout)
    try:
        function = PEERS[peer](layout)
        result = function(qkv)
        own = step(function)
    except (ImportError, AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        if peer.startswith("varlen_attention"):
            raise
        pytest.skip(f"{peer}: {type(error).__name__}: {str(error)[:200]}")
    torch.testing.assert_close(result, baseline(qkv), atol=2e-2, rtol=2e-2)
    compare(own, step(baseline), least_bytes=(24 if backward else 8) * qkv.numel() // 3, rounds=31)
    floor = floor_seconds(layout, heads, backward)
    benchmark.extra_info["share_of_H200_floor"] = round(floor / benchmark.stats.stats.median, 3)
