"""Distillation: self-distillation's formulas without masks, a teacher that stands still, an average that follows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dinov2.objectives import Distillation, ObjectiveConfig, build_networks
from tests.objectives.textbook import (
    HEAD,
    IBOT_HEAD,
    TEMPERATURE,
    VIT,
    assert_close,
    gradients,
    random_batch,
    textbook_step,
)

WIDER = replace(VIT, embed_dim=32, depth=3)


def make_distillation(separate: bool, **config: Any) -> Distillation:
    """A float64 objective with a wider and deeper teacher."""
    torch.manual_seed(1)
    student, _ = build_networks(VIT, HEAD, IBOT_HEAD if separate else None)
    teacher, _ = build_networks(WIDER, replace(HEAD, hidden_dim=28), IBOT_HEAD if separate else None)
    return Distillation(student, teacher, ObjectiveConfig(**config)).double()


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_two_steps_equal_the_formulas(centering: str, separate: bool) -> None:
    objective = make_distillation(separate, centering=centering)
    centers = {name.split("_")[0]: buffer.clone() for name, buffer in objective.named_buffers()}
    for seed in range(2):
        batch = random_batch(seed=seed)
        losses = objective(batch, TEMPERATURE)
        whole = batch | {"masks": torch.ones_like(batch["masks"])}
        expected = textbook_step(objective, whole, centers, hidden=False)
        assert_close(losses, expected)
        assert_close(gradients(losses, objective.student), gradients(expected, objective.student))


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
        "teacher: expected the student's 24 prototypes in dino_head, got 25": (VIT, replace(HEAD, out_dim=25), None),
        "teacher: expected the student's modules backbone, dino_head, got .*ibot_head": (VIT, HEAD, IBOT_HEAD),
        "teacher: expected the student's patches of 7 pixels, got 14": (replace(VIT, patch_size=14), HEAD, None),
    }
    for message, networks in cases.items():
        with pytest.raises(ValueError, match=message):
            Distillation(student, build_networks(*networks)[0], ObjectiveConfig())
