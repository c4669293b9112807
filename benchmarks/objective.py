"""Heads and losses of one step, forward and backward: logits stored, or recomputed, beside the published recipe.

There is no backbone: its tokens are leaves. The batch has B = 16 images in 2 global and 8 local crops; 15 % of the
patches, some 1200, are masked. Separate heads have K = 65,536 prototypes of 256 columns. The dtype is float32, or
bfloat16 with autocast.

Prediction for two cores (190 and 400 GFLOP/s of matrix products in float32 and bfloat16, 27 GB/s), for N = 1390 student
rows and 1260 teacher rows, which are 91 M student logits:

- Matrix products of the last layers: teacher 42 GFLOP, student 140 (three products), 182 in all; 0.96 s in float32,
  0.46 in bfloat16. Recomputed logits need one more product for each student row and two for each teacher row: 313
  GFLOP.
- The recipe's losses are some 30 elementwise passes over 364 MB of float32: 0.8 s.
- Ours: three reads and exponentials for Sinkhorn-Knopp; two reads and two exponentials forward; two reads, one write
  and two exponentials backward: 3 GB in 0.15 s.
- So 1.1 s against 1.8 s in float32 (1.6 times faster), 0.6 s against 1.3 s in bfloat16 (2.1 times). Recomputing adds
  0.7 s in float32 and 0.3 s in bfloat16: it is not faster here, and saves 364 MB of logits.

Measured (results/2026-11-25): 2.5 s stored and 2.3 s recomputed in float32, 1.6 and 1.7 times faster than the recipe;
1.6 and 1.4 s in bfloat16, 2.1 and 2.4 times. Extra peak memory: 0.50 of the recipe's stored and 0.14 recomputed in
float32, 0.36 and 0.07 in bfloat16. What the prediction missed:

- It did not count the heads' MLPs, 60 GFLOP, nor the mapping of new memory for logits, for gradients of weights and, in
  the recipe, for much more.
- Recomputing is faster, too: computing again costs less here than mapping 364 MB of logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.memory import printed_by
from benchmarks.sinkhorn import TEMPERATURE
from benchmarks.sinkhorn import recipe as sinkhorn_recipe
from dinov2.models import DINOHead
from dinov2.objectives import ObjectiveConfig, SelfDistillation

if TYPE_CHECKING:
    from benchmarks.conftest import Compare

B, LOCAL_CROPS, PATCHES, D, K = 16, 8, 256, 384, 65536


class GivenTokens(nn.Module):
    """A backbone's stand-in: its tokens are parameters, for every size of crop."""

    def __init__(self) -> None:
        super().__init__()
        self.globals = nn.Parameter(torch.randn(2 * B, 1 + PATCHES, D))
        self.locals = nn.Parameter(torch.randn(LOCAL_CROPS * B, 1, D))

    def forward_features(self, crops: list[Tensor], masks: list[Tensor | None]) -> list[dict[str, Tensor]]:
        tokens = [self.globals, self.locals][: len(crops)]
        return [{"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1:]} for x in tokens]


def networks() -> list[nn.ModuleDict]:
    torch.manual_seed(0)
    pair = [
        nn.ModuleDict({"backbone": GivenTokens(), "dino_head": DINOHead(D, K), "ibot_head": DINOHead(D, K)})
        for _ in range(2)
    ]
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2 * B, PATCHES, generator=generator) < 0.15
    return {
        "global_crops": torch.zeros(2 * B, 3, 1, 1),
        "local_crops": torch.zeros(LOCAL_CROPS * B, 3, 1, 1),
        "masks": masks,
    }


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * torch.log_softmax(logits.float() / 0.1, dim=-1)).sum(dim=-1)


def class_and_patch_losses(
    global_logits: Tensor,
    local_logits: Tensor,
    patch_logits: Tensor,
    class_targets: Tensor,
    patch_targets: Tensor,
    masks: Tensor,
) -> Tensor:
    """DINO and iBOT as published: targets are matrices, and each student crop meets each target in a separate pass."""
    L = 2 * len(local_logits) // len(global_logits)
    targets = class_targets.chunk(2)
    loss = sum(cross_entropy(s, t).mean() for s in local_logits.chunk(L) for t in targets)
    loss = loss + sum(cross_entropy(s, t).mean() for s, t in zip(global_logits.chunk(2), targets[::-1], strict=True))
    weight = 1 / masks.sum(dim=1)[masks.nonzero()[:, 0]] / len(masks)  # [M]
    return loss / (2 + 2 * L) + (cross_entropy(patch_logits, patch_targets) * weight).sum()


def recipe_loss(student: nn.ModuleDict, teacher: nn.ModuleDict, masks: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = teacher["backbone"].globals
        class_targets = sinkhorn_recipe(teacher["dino_head"](tokens[:, 0]))
        patch_targets = sinkhorn_recipe(teacher["ibot_head"](tokens[:, 1:][masks]))
    tokens, local_tokens = student["backbone"].globals, student["backbone"].locals
    global_logits, local_logits = student["dino_head"](tokens[:, 0]), student["dino_head"](local_tokens[:, 0])
    patch_logits = student["ibot_head"](tokens[:, 1:][masks])
    return class_and_patch_losses(global_logits, local_logits, patch_logits, class_targets, patch_targets, masks)


def step_of(name: str, bf16: bool) -> Callable[[], None]:
    student, teacher = networks()
    given = batch()
    options: dict[str, Any] = {} if name == "recipe" else {"student_logits": name}
    config = ObjectiveConfig(centering="sinkhorn_knopp", koleo_weight=0.0, **options)
    objective = SelfDistillation(student, teacher, config)

    def loss_of_step() -> Tensor:
        if name == "recipe":
            return recipe_loss(student, teacher, given["masks"])
        return objective(given, TEMPERATURE)["total"]

    def step() -> None:
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of_step()
        loss.backward()

    return step


@pytest.mark.parametrize("student_logits", ["stored", "recomputed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_heads_and_losses(benchmark: BenchmarkFixture, compare: Compare, bf16: bool, student_logits: str) -> None:
    benchmark.group = f"heads and losses, {'bfloat16' if bf16 else 'float32'}, speedup over the recipe"
    rows = (2 + LOCAL_CROPS) * B + int(batch()["masks"].sum())
    flops = 2 * (3 * rows + 2 * B + int(batch()["masks"].sum())) * K * 256
    compare(step_of(student_logits, bf16), step_of("recipe", bf16), least_bytes=0, rounds=5, flops=flops)


PEAK_MEMORY = """
import sys
import torch
from benchmarks import objective
from benchmarks.memory import extra_peak

step = objective.step_of(sys.argv[1], sys.argv[2] == "bfloat16")
step()  # starts the threads and allocates the gradients of the parameters
print(extra_peak(step))
"""


def extra_peak(name: str, dtype: str) -> int:
    """Peak bytes of a step beyond the bytes before it, in a separate process."""
    return printed_by(PEAK_MEMORY, name, dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("student_logits", ["stored", "recomputed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(benchmark: BenchmarkFixture, dtype: str, student_logits: str) -> None:
    benchmark.group = f"extra peak memory of heads and losses, {dtype}, beside the recipe's"
    ours = benchmark.pedantic(extra_peak, (student_logits, dtype), rounds=1)
    recipe = extra_peak("recipe", dtype)
    benchmark.extra_info |= {
        "extra_peak_MB": round(ours / 1e6),
        "recipe_extra_peak_MB": round(recipe / 1e6),
        "share_of_recipe": round(ours / recipe, 2),
    }
