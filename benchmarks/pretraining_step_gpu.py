"""A whole pretraining step on a GPU: ours beside two of plain PyTorch, at 64 images, drop path 0.3, bfloat16.

- eager: the step of ``benchmarks/pretraining_step.py``, in the style of iBOT, and without FlashAttention;
- packed: the step that a careful user writes with PyTorch alone. Linear layers take the tokens of all crops at once,
  attention is ``scaled_dot_product_attention`` for each size, and stochastic depth gathers the kept samples and adds
  their branches back.

Both hold targets and logits as matrices. All steps have separate heads with 65,536 prototypes, Sinkhorn-Knopp, AdamW
and an EMA teacher. If a peer runs out of memory, the result says so, and has the time of ours alone.

Prediction (no GPU has run this yet). On an H200, a later count gives 225 ms for ViT-L/14: 140 of products (94 TFLOP at
670 TFLOP/s) and 85 of passes over memory. Since that count, one pass does the end of a block and the start of the next,
which should save 2.7 ms. On an H100 at 400 TFLOP/s and 2.5 TB/s, ours needs 64 x 1.37 TFLOP = 88 TFLOP a step: 220 ms,
and some 60 ms of passes over memory. The eager step also computes the branches that drop path zeroes, 1.35 times the
products, and moves its tokens twice as often: 300 + 300 ms, 2.1 times as long. It takes three times the memory: 18
widths of a token and matrices of attention for each block. The packed step has the same products as ours and moves half
more: 1.3 times as long. Memory and launches limit ViT-S/16: the eager step takes 2 to 3 times as long, the packed step
1.5 times.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu
from benchmarks.pretraining_step import DROP_PATH, batch, eager_loss, features_apart
from benchmarks.sinkhorn import TEMPERATURE
from dinov2.models import HeadConfig, VisionTransformer, ViTConfig
from dinov2.objectives import ObjectiveConfig, SelfDistillation, build_networks
from dinov2_kernels.residual.sampling import num_kept_samples

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

pytestmark = pytest.mark.gpu

IMAGES = 64
VITS = {"ViT-L/14": ("vit_large", 14), "ViT-S/16": ("vit_small", 16), "ViT-B/14": ("vit_base", 14)}
PREDICTED = {"ViT-L/14": 0.225}  # seconds, on an H200
OPERATIONS = {"ViT-L/14": 94e12}  # of matrix products
Parts = list[Tensor]  # [B, N, D] for each size of crop


def together(parts: Parts, function: Callable[[Tensor], Tensor]) -> Parts:
    """Apply a function of rows to the tokens of all crops at once."""
    rows = function(torch.cat([part.flatten(0, 1) for part in parts]))  # [T, D']
    chunks = rows.split([part.shape[0] * part.shape[1] for part in parts])
    return [chunk.view(*part.shape[:2], -1) for chunk, part in zip(chunks, parts, strict=True)]


def attention(block: Any, parts: Parts) -> Parts:
    attended = []
    for qkv in together(parts, lambda rows: block.attn.qkv(block.norm1(rows))):
        q, k, v = qkv.unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D / H] each
        attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return together(attended, lambda rows: block.ls1.gamma * block.attn.proj(rows))


def feed_forward(block: Any, parts: Parts) -> Parts:
    return together(parts, lambda rows: block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(rows)))))


def residual(parts: Parts, branch: Callable[[Parts], Parts], rate: float) -> Parts:
    """Add the output of a branch to the samples that stochastic depth keeps."""
    if rate == 0.0:
        return [x + added for x, added in zip(parts, branch(parts), strict=True)]
    kept = [torch.randperm(len(x), device=x.device)[: num_kept_samples(len(x), rate)] for x in parts]
    added = branch([x[index] for x, index in zip(parts, kept, strict=True)])
    return [
        x.index_add(0, index, y.to(x.dtype), alpha=len(x) / len(index))
        for x, index, y in zip(parts, kept, added, strict=True)
    ]


def features_packed(vit: VisionTransformer, images: list[Tensor], masks: list[Tensor | None], rate: float) -> Parts:
    """Features with all crops packed, in the form of :func:`benchmarks.pretraining_step.features_apart`."""
    parts = [vit._tokens(x, mask) for x, mask in zip(images, masks, strict=True)]
    for block in vit.blocks:
        parts = residual(parts, lambda subset, block=block: attention(block, subset), rate)
        parts = residual(parts, lambda subset, block=block: feed_forward(block, subset), rate)
    return together(parts, vit.norm)


PEERS: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]] = {
    "eager": (features_apart, lambda: sdpa_kernel(SDPBackend.MATH)),
    "packed": (features_packed, nullcontext),
}


def step_of(name: str, vit: ViTConfig, images: int, device: str) -> Callable[[], Tensor]:
    """A step of a peer, or of ours with "stored" or "recomputed" logits."""
    torch.manual_seed(0)
    head = HeadConfig()
    with torch.device(device):
        student, teacher = build_networks(vit, head, head)
    given = {key: value.to(device) for key, value in batch(images, vit.patch_size).items()}
    options: dict[str, Any] = {} if name in PEERS else {"student_logits": name}
    config = ObjectiveConfig(centering="sinkhorn_knopp", koleo_weight=0.0, **options)
    objective = SelfDistillation(student, teacher, config)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    ours = given | {"masks": given["masks"].cpu()}  # the host may read their number there

    def loss() -> Tensor:
        if name not in PEERS:
            return objective(ours, TEMPERATURE)["total"]
        features, backend = PEERS[name]
        with backend():
            return eager_loss(student, teacher, given, vit.drop_path_rate, features)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            total = loss()
        total.backward()
        optimizer.step()
        objective.update_average(0.99)
        return total.detach()

    return step


def with_peak(build: Callable[[], Callable[[], Tensor]]) -> tuple[Callable[[], Tensor], int]:
    """A step, and the peak bytes of its tensors, networks included."""
    held = torch.cuda.memory_allocated()
    step = build()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, torch.cuda.max_memory_allocated() - held


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("student_logits", ["stored", "recomputed"])
@pytest.mark.parametrize("name", VITS)
def test_step(benchmark: BenchmarkFixture, compare: Compare, name: str, student_logits: str, peer: str) -> None:
    benchmark.group = f"step of {name}, {IMAGES} images, bfloat16, speedup over the {peer} step"
    architecture, patch_size = VITS[name]
    vit = ViTConfig.of(architecture, patch_size=patch_size, drop_path_rate=DROP_PATH)
    ours, own_peak = with_peak(lambda: step_of(student_logits, vit, IMAGES, "cuda"))
    extra: dict[str, Any] = {"peak_MB": round(own_peak / 1e6)}
    try:
        theirs, their_peak = with_peak(lambda: step_of(peer, vit, IMAGES, "cuda"))
        extra |= {"peer_peak_MB": round(their_peak / 1e6), "share_of_peer": round(own_peak / their_peak, 2)}
    except torch.OutOfMemoryError:
        extra["peer_peak_MB"] = "out of memory"
        theirs = ours
    floor = OPERATIONS.get(name, 0.0) / gpu.OPERATIONS_PER_SECOND
    compare(ours, theirs, least_bytes=0, rounds=7, floor=floor, predicted=PREDICTED.get(name))
    benchmark.extra_info |= extra | {"images_per_second": round(IMAGES / benchmark.stats.stats.median, 1)}


def test_all_steps_compute_the_same() -> None:
    """The test turns stochastic depth off, because its draws differ."""
    losses = {}
    vit = ViTConfig.of("vit_small", patch_size=16, depth=2)
    for name in ("stored", *PEERS):
        losses[name] = float(step_of(name, vit, 4, "cuda")())
    assert losses["packed"] == pytest.approx(losses["eager"], rel=5e-3)
    assert losses["stored"] == pytest.approx(losses["eager"], rel=5e-3)
