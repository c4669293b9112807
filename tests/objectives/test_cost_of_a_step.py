"""What a step costs beside its arithmetic: rows through the heads, logits in memory, waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinov2.objectives import ObjectiveConfig, SelfDistillation, build_networks
from tests.objectives.textbook import HEAD, MASKED, TEMPERATURE, VIT, make_objective, random_batch


def test_heads_see_class_tokens_and_masked_patches_only() -> None:
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: rows.update({name: len(inputs[0])})

    for separate in (False, True):
        objective = make_objective(ObjectiveConfig(), separate)
        for role in ("student", "teacher"):
            for head, module in getattr(objective, role).items():
                if head != "backbone":
                    module.mlp.register_forward_pre_hook(count(f"{role} {head} {separate}"))
        objective(random_batch(), TEMPERATURE)
    M = sum(MASKED)
    assert rows == {
        "teacher dino_head False": 6 + M,
        "student dino_head False": 12 + M,
        "teacher dino_head True": 6,
        "student dino_head True": 12,
        "teacher ibot_head True": M,
        "student ibot_head True": M,
    }


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_a_step_never_asks_the_device_for_a_value(centering: Any) -> None:
    """Meta tensors have no values: whatever would wait for a GPU raises on them. The masks stay on the host."""
    objective = make_objective(ObjectiveConfig(centering=centering), True).float().to("meta")
    batch = {name: tensor.float().to("meta") if name != "masks" else tensor for name, tensor in random_batch().items()}
    losses = objective(batch, TEMPERATURE)
    losses["total"].backward()
    objective.update_average(0.9)
    statistics = objective.collapse_statistics(batch["global_crops"], TEMPERATURE)
    assert all(value.is_meta and value.shape == () for value in (losses | statistics).values())
    with pytest.raises(NotImplementedError, match="nonzero"):
        objective(batch | {"masks": batch["masks"].to("meta")}, TEMPERATURE)


class LogitShapes(TorchDispatchMode):
    """Collects the dtypes and numbers of rows of all tensors [rows, K] that PyTorch's operators return."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.K = K
        self.seen: dict[torch.dtype, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == self.K:
                self.seen.setdefault(tensor.dtype, set()).add(len(tensor))
        return result


@pytest.mark.parametrize("student_logits", ["stored", "recomputed"])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_a_step_in_bfloat16_allocates_no_logits_in_float32(centering: Any, separate: bool, student_logits: Any) -> None:
    torch.manual_seed(1)
    K, M = 997, sum(MASKED)
    head = replace(HEAD, out_dim=K, bottleneck_dim=10)  # unlike any number of rows
    config = ObjectiveConfig(centering=centering, student_logits=student_logits)
    objective = SelfDistillation(*build_networks(VIT, head, head if separate else None), config)
    batch = {name: tensor.float() if name != "masks" else tensor for name, tensor in random_batch().items()}
    with LogitShapes(K) as logits:
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective(batch, TEMPERATURE)
        losses["total"].backward()
    teacher_rows, student_rows = {6, M}, {12, M}
    assert not logits.seen.get(torch.float32, set()) & (teacher_rows | student_rows | {6 + M, 12 + M})
    assert logits.seen[torch.bfloat16] >= teacher_rows
    assert (12 in logits.seen[torch.bfloat16]) == (student_logits == "stored")


def test_a_backward_pass_that_has_overwritten_the_logits_cannot_run_again() -> None:
    losses = make_objective(ObjectiveConfig(), True)(random_batch(), TEMPERATURE)
    losses["total"].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses["total"].backward()
