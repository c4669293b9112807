"""The objective as a whole: every term, every gradient and the state between steps, against written-out formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.models import HeadConfig
from dinov2.objectives import ObjectiveConfig, SelfDistillation, build_networks
from tests.objectives.textbook import (
    HEAD,
    IBOT_HEAD,
    TEMPERATURE,
    VIT,
    Batch,
    assert_close,
    gradients,
    make_objective,
    random_batch,
    textbook_softmax,
    textbook_step,
)
from tests.process_group import in_processes


@pytest.mark.parametrize("student_logits", ["stored", "recomputed"])
@pytest.mark.parametrize("local", [2, 0])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_two_steps_equal_the_formulas(centering: Any, separate: bool, local: int, student_logits: Any) -> None:
    config = ObjectiveConfig(centering=centering, ibot_weight=0.7, dino_weight=1.3, student_logits=student_logits)
    objective = make_objective(config, separate)
    centers = {name.split("_")[0]: buffer.clone() for name, buffer in objective.named_buffers()}
    for seed in range(2):
        batch = random_batch(local=local, seed=seed)
        losses = objective(batch, TEMPERATURE)
        expected = textbook_step(objective, batch, centers)
        assert_close(losses, expected)
        assert_close(gradients(losses, objective.student), gradients(expected, objective.student))
    for name, center in centers.items():
        torch.testing.assert_close(objective.get_buffer(f"{name}_centering.center"), center, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("term", ["dino_weight", "ibot_weight", "koleo_weight"])
def test_a_term_of_weight_zero_is_measured_but_not_optimised(term: str, separate: bool) -> None:
    config = replace(ObjectiveConfig(koleo_weight=0.3), **{term: 0.0})
    objective = make_objective(config, separate)
    centers = {name.split("_")[0]: buffer.clone() for name, buffer in objective.named_buffers()}
    batch = random_batch()
    losses = objective(batch, TEMPERATURE)
    expected = textbook_step(objective, batch, centers)
    assert_close(losses, expected)
    assert_close(gradients(losses, objective.student), gradients(expected, objective.student))


def test_local_crops_may_be_absent() -> None:
    batch = random_batch(local=0)
    expected = make_objective(ObjectiveConfig(), False)(batch, TEMPERATURE)
    del batch["local_crops"]
    assert_close(make_objective(ObjectiveConfig(), False)(batch, TEMPERATURE), expected)
    assert expected["dino_local"].item() == 0


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_without_masked_patches_ibot_is_zero_and_its_centre_stays(centering: Any) -> None:
    objective = make_objective(ObjectiveConfig(centering=centering), True)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    batch = random_batch()
    batch["masks"].zero_()
    losses = objective(batch, TEMPERATURE)
    assert losses["ibot"].item() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(losses, objective.student).values())
    for name, buffer in objective.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith("ibot")


@pytest.mark.parametrize("init_values", [1e-5, 1.0])
def test_initial_cross_entropy_with_sinkhorn(init_values: float) -> None:
    losses = _initial_losses("sinkhorn_knopp", init_values)
    expected = math.log(65536) + 1 / (2 * 0.1**2 * 256)
    assert (losses["dino_local"] + losses["dino_global"]).item() == pytest.approx(expected, rel=0.01)


def test_initial_cross_entropy_before_the_centre_has_moved() -> None:
    # LayerScale of 1e-5 makes all class tokens equal at first, so student and teacher logits are equal, not
    # independent: their covariance 1 / d lowers the cross-entropy by 1 / (d T_student T_teacher).
    losses = _initial_losses("softmax", 1e-5)
    expected = math.log(65536) + 1 / (2 * 0.1**2 * 256) - 1 / (256 * 0.1 * TEMPERATURE)
    assert (losses["dino_local"] + losses["dino_global"]).item() == pytest.approx(expected, rel=0.01)


def _initial_losses(centering: Any, init_values: float) -> dict[str, Tensor]:
    torch.manual_seed(0)
    head = HeadConfig(out_dim=65536, hidden_dim=64, bottleneck_dim=256)
    networks = build_networks(replace(VIT, init_values=init_values), head)
    batch = {name: tensor.float() if name != "masks" else tensor for name, tensor in random_batch().items()}
    with torch.no_grad():
        losses: dict[str, Tensor] = SelfDistillation(*networks, ObjectiveConfig(centering=centering))(
            batch, TEMPERATURE
        )
    return losses


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_losses_stay_float32_in_autocast(centering: Any) -> None:
    objective = make_objective(ObjectiveConfig(centering=centering), True).float()
    batch = {name: tensor.float() if name != "masks" else tensor for name, tensor in random_batch().items()}
    objective.eval()  # the centre stays, so both passes have the same targets
    plain = objective(batch, TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(batch, TEMPERATURE)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, plain[name], rtol=0.05, atol=0.02, msg=lambda text, name=name: name + text)
    assert all(gradient.isfinite().all() for gradient in gradients(losses, objective.student).values())


def test_the_teacher_is_only_read() -> None:
    objective = make_objective(ObjectiveConfig(), True).train()
    before = {name: p.clone() for name, p in objective.teacher.named_parameters()}
    objective(random_batch(), TEMPERATURE)["total"].backward()
    assert not any(module.training for module in objective.teacher.modules())
    assert all(module.training for module in objective.student.modules())
    for name, parameter in objective.teacher.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert all(parameter.grad is not None for parameter in objective.student.parameters())


def test_evaluation_mode_moves_no_centre() -> None:
    objective = make_objective(ObjectiveConfig(), True).eval()
    first = objective(random_batch(), TEMPERATURE)
    assert_close(objective(random_batch(), TEMPERATURE), first, 0.0)
    objective.train()(random_batch(), TEMPERATURE)
    assert not torch.equal(objective(random_batch(), TEMPERATURE)["total"], first["total"])


def test_state_dict_resumes_the_centres() -> None:
    objective = make_objective(ObjectiveConfig(), True)
    objective(random_batch(), TEMPERATURE)
    resumed = make_objective(ObjectiveConfig(), True)
    resumed.load_state_dict(objective.state_dict())
    assert_close(resumed(random_batch(seed=1), TEMPERATURE), objective(random_batch(seed=1), TEMPERATURE), 0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_teacher_follows_the_student(momentum: float) -> None:
    objective = make_objective(ObjectiveConfig(), True)
    expected = {
        name: momentum * p + (1 - momentum) * dict(objective.student.named_parameters())[name]
        for name, p in objective.teacher.named_parameters()
    }
    objective.update_average(momentum)
    assert_close(dict(objective.teacher.named_parameters()), expected, 1e-14)


def test_build_networks_starts_teacher_and_student_equal() -> None:
    student, teacher = build_networks(replace(VIT, drop_path_rate=0.3), HEAD, IBOT_HEAD)
    assert_close(dict(teacher.state_dict()), dict(student.state_dict()), 0.0)
    assert set(student) == {"backbone", "dino_head", "ibot_head"}
    assert set(build_networks(VIT, HEAD)[0]) == {"backbone", "dino_head"}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {p.data_ptr() for p in teacher.parameters()}.isdisjoint(p.data_ptr() for p in student.parameters())
    teacher.train()
    crops = random_batch()["global_crops"].float()
    first, second = (teacher["backbone"].forward_features(crops)["x_norm_clstoken"] for _ in range(2))
    assert torch.equal(first, second)  # no stochastic depth


def test_collapse_statistics() -> None:
    objective = make_objective(ObjectiveConfig(), True)
    crops = random_batch()["global_crops"]
    before = objective.dino_centering.center.clone()
    statistics = objective.collapse_statistics(crops, TEMPERATURE)
    assert torch.equal(objective.dino_centering.center, before)
    logits = objective.teacher["dino_head"](objective.teacher["backbone"].forward_features(crops)["x_norm_clstoken"])
    targets = textbook_softmax(logits - before, TEMPERATURE)
    mean = targets.mean(dim=0)
    expected = {
        "target_entropy": -(targets * targets.log()).sum(dim=1).mean(),
        "mean_target_entropy": -(mean * mean.log()).sum(),
        "used_prototypes": torch.tensor(len(set(targets.argmax(dim=1).tolist())) / 24, dtype=torch.float64),
    }
    assert_close(statistics, expected)


def _train_in_a_group(rank: int, world_size: int) -> None:
    whole = random_batch(images=4)
    mine = {
        name: torch.cat([crop.split(4 // world_size)[rank] for crop in tensor.split(4)])
        for name, tensor in whole.items()
    }  # some of the images, every crop of them
    for centering, tolerance in (("softmax", 1e-10), ("sinkhorn_knopp", 1e-5)):  # log u passes through float32
        config = ObjectiveConfig(centering=centering)  # type: ignore[arg-type]
        split, single = make_objective(config, True, group=dist.group.WORLD), make_objective(config, True)
        for _ in range(2):  # the second step shows that the centres are the same
            losses, expected = split(mine, TEMPERATURE), single(whole, TEMPERATURE)
            actual = gradients(losses, split.student)
            for tensor in [*actual.values(), *losses.values()]:
                tensor.detach().div_(world_size)
                dist.all_reduce(tensor.detach())
            assert_close({name: loss.detach() for name, loss in losses.items()}, expected, tolerance)
            assert_close(actual, gradients(expected, single.student), tolerance)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_train_as_one(world_size: int, tmp_path: Path) -> None:
    in_processes(world_size, tmp_path, _train_in_a_group)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_crops": torch.randn(5, 3, 28, 28)}, "global_crops: expected two crops of every image, got 5 crops"),
        ({"local_crops": torch.randn(4, 3, 14, 14)}, "local_crops: expected a multiple of 3, .* got 4"),
        ({"masks": torch.zeros(5, 16, dtype=torch.bool)}, r"masks: expected bool \[6, patches\] .* \[5, 16\]"),
        ({"masks": torch.zeros(6, 16)}, r"masks: expected bool \[6, patches\] .* torch.float32 \[6, 16\]"),
    ],
)
def test_batches_that_do_not_fit_are_named(changes: Batch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(ObjectiveConfig(), False)(random_batch() | changes, TEMPERATURE)


def test_a_single_image_is_too_few_for_koleo_only() -> None:
    batch = random_batch(images=1)
    with pytest.raises(ValueError, match=r"batch too small for KoLeo: .* at least 2 images, got 1"):
        make_objective(ObjectiveConfig(), False)(batch, TEMPERATURE)
    assert make_objective(ObjectiveConfig(koleo_weight=0), False)(batch, TEMPERATURE)["total"].isfinite()


def test_networks_that_do_not_fit_are_named() -> None:
    student, teacher = build_networks(VIT, HEAD)
    with pytest.raises(ValueError, match="teacher: expected modules backbone and dino_head, got backbone"):
        SelfDistillation(student, nn.ModuleDict({"backbone": teacher["backbone"]}), ObjectiveConfig())
    _, larger = build_networks(VIT, replace(HEAD, hidden_dim=25))
    with pytest.raises(ValueError, match=r"teacher: expected the student's parameters, .* dino_head.mlp"):
        SelfDistillation(student, larger, ObjectiveConfig())
    with pytest.raises(ValueError, match=r"momentum: expected a number from 0 to 1, got 1\.5"):
        SelfDistillation(student, teacher, ObjectiveConfig()).update_average(1.5)
