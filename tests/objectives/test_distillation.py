"""Distillation: self-distillation's formulas without masks, a teacher that stands still, an average that follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from dinov2.objectives import Distillation, ObjectiveConfig, build_networks
from tests.objectives.textbook import (
    HEAD,
    IBOT_HEAD,
    TEMPERATURE,
    VIT,
    assert_close,
    random_batch,
    textbook_step,
)

WIDER = replace(VIT, embed_dim=32, depth=3)
NARROWER = replace(VIT, embed_dim=VIT.embed_dim // 2, num_heads=1)


def make_distillation(separate: bool, **config: Any) -> Distillation:
    """A float64 objective of two students with a wider and deeper teacher."""
    torch.manual_seed(1)
    ibot_head = IBOT_HEAD if separate else None
    students = {name: build_networks(vit, HEAD, ibot_head)[0] for name, vit in (("wide", VIT), ("narrow", NARROWER))}
    teacher, _ = build_networks(WIDER, replace(HEAD, hidden_dim=28), ibot_head)
    return Distillation(students, teacher, ObjectiveConfig(**config)).double()


@dataclass
class Pair:
    """What the textbook reads of an objective: one student with the teacher."""

    student: nn.ModuleDict
    teacher: nn.ModuleDict
    config: ObjectiveConfig


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_two_steps_equal_the_formulas(centering: str, separate: bool) -> None:
    objective = make_distillation(separate, centering=centering)
    centers = {name.split("_")[0]: buffer.clone() for name, buffer in objective.named_buffers()}
    for seed in range(2):
        batch = random_batch(seed=seed)
        objective.zero_grad()
        losses = objective(batch, TEMPERATURE)
        losses["total"].backward()
        whole, total = batch | {"masks": torch.ones_like(batch["masks"])}, torch.zeros((), dtype=torch.float64)
        for name, student in objective.students.items():
            moved = dict(centers)
            expected = textbook_step(Pair(student, objective.teacher, objective.config), whole, moved, hidden=False)
            assert_close({term: losses[f"{name}/{term}"] for term in expected}, expected)
            trained = {part: p for part, p in student.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(expected["total"], list(trained.values()))
            assert_close({part: p.grad for part, p in trained.items()}, dict(zip(trained, gradients, strict=True)))
            total += expected["total"].detach()
        assert_close({"total": losses["total"]}, {"total": total})
        centers = moved


def test_the_teacher_runs_once_for_all_students() -> None:
    objective, calls = make_distillation(False), []
    objective.teacher["backbone"].norm.register_forward_hook(lambda *_: calls.append(1))
    objective(random_batch(), TEMPERATURE)
    assert len(calls) == 1


def test_the_average_follows_the_student_and_the_teacher_stands_still() -> None:
    objective = make_distillation(True).train()
    assert not any(module.training for module in [*objective.teacher.modules(), *objective.average.modules()])
    teacher = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    start = {name: p.clone() for name, p in objective.average.named_parameters()}
    assert_close(start, dict(objective.student.named_parameters()), 0.0)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter += 1
    objective.update_average(0.75)
    assert_close(dict(objective.average.named_parameters()), {name: p + 0.25 for name, p in start.items()}, 1e-12)
    assert_close(dict(objective.teacher.named_parameters()), teacher, 0.0)
    assert not any(p.requires_grad for p in [*objective.average.parameters(), *objective.teacher.parameters()])


def test_state_dict_holds_the_average() -> None:
    objective, resumed = make_distillation(False), make_distillation(False)
    with torch.no_grad():
        for parameter in objective.average.parameters():
            parameter += 1
    resumed.load_state_dict(objective.state_dict())
    assert_close(dict(resumed.average.named_parameters()), dict(objective.average.named_parameters()), 0.0)


def test_networks_that_do_not_fit_are_named() -> None:
    student, _ = build_networks(VIT, HEAD)
    cases = {
        "student s: teacher: expected the student's 24 prototypes in dino_head, got 25": (
            VIT,
            replace(HEAD, out_dim=25),
            None,
        ),
        "student s: teacher: expected the student's modules backbone, dino_head, got .*ibot_head": (
            VIT,
            HEAD,
            IBOT_HEAD,
        ),
        "student s: expected the teacher's patches of 14 pixels, got 7": (replace(VIT, patch_size=14), HEAD, None),
    }
    for message, networks in cases.items():
        with pytest.raises(ValueError, match=message):
            Distillation({"s": student}, build_networks(*networks)[0], ObjectiveConfig())
