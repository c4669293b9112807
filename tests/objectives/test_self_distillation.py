"""The objective as a whole: every term, every gradient and the state between steps, against written-out formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from dinov2.models import HeadConfig, ViTConfig
from dinov2.objectives import ObjectiveConfig, SelfDistillation, build_networks

VIT = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2, init_values=1.0)
HEAD = HeadConfig(out_dim=24, hidden_dim=20, bottleneck_dim=12)
IBOT_HEAD = HeadConfig(out_dim=18, hidden_dim=20, bottleneck_dim=10)
TEMPERATURE = 0.05
MASKED = [3, 0, 5, 1, 0, 16]  # masked patches of each global crop, of 16

Batch = dict[str, Tensor]


def random_batch(images: int = 3, local: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2 * images, 16, dtype=torch.bool)
    for row, count in zip(masks, MASKED, strict=False):
        row[torch.randperm(16, generator=generator)[:count]] = True
    return {
        "global_crops": torch.randn(2 * images, 3, 28, 28, dtype=torch.float64, generator=generator),
        "local_crops": torch.randn(local * images, 3, 14, 14, dtype=torch.float64, generator=generator),
        "masks": masks,
    }


def make_objective(config: ObjectiveConfig, separate: bool, **kwargs: Any) -> SelfDistillation:
    """A float64 objective whose teacher and centres have drifted from where they start."""
    torch.manual_seed(1)
    student, teacher = build_networks(VIT, HEAD, IBOT_HEAD if separate else None)
    objective = SelfDistillation(student, teacher, config, **kwargs).double()
    with torch.no_grad():
        for tensor in [*objective.teacher.parameters(), *objective.buffers()]:
            tensor += 0.05 * torch.randn_like(tensor)
    return objective


def textbook_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """Targets after 3 alternating scalings; u passes through float32, which is what the library returns log u in."""
    E = torch.exp(logits / temperature)  # [B, K]
    v = torch.ones(len(E), dtype=E.dtype)
    for _ in range(3):
        u = 1 / (E.T @ v)
        v = 1 / (E @ u)
    weights = E * u.log().float().double().exp()
    return weights / weights.sum(dim=1, keepdim=True)


def textbook_softmax(logits: Tensor, temperature: float) -> Tensor:
    weights = torch.exp((logits - logits.max()) / temperature)
    return weights / weights.sum(dim=1, keepdim=True)


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows, at the student's temperature 0.1."""
    probabilities = torch.exp(student / 0.1) / torch.exp(student / 0.1).sum(dim=1, keepdim=True)
    return -(targets * probabilities.log()).sum(dim=1).mean()


def textbook_koleo(tokens: Tensor) -> Tensor:
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    terms = []
    for i, row in enumerate(unit):
        distances = [((row - other + 1e-8).norm(), j) for j, other in enumerate(unit) if j != i]
        terms.append(-torch.log(min(distances, key=lambda pair: pair[0].item())[0] + 1e-8))
    return torch.stack(terms).mean()


def textbook_step(objective: SelfDistillation, batch: Batch, centers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of one step, crop by crop and image by image; moves ``centers`` as the step does."""
    student, teacher, config = objective.student, objective.teacher, objective.config
    patch_head = "ibot_head" if "ibot_head" in student else "dino_head"
    global_crops, masks = batch["global_crops"], batch["masks"]
    B = len(global_crops) // 2

    def targets(name: str, logits: Tensor) -> Tensor:
        if config.centering == "sinkhorn_knopp":
            return textbook_sinkhorn(logits, TEMPERATURE)
        center = centers[name]
        centers[name] = 0.9 * center + 0.1 * logits.mean(dim=0)
        return textbook_softmax(logits - center, TEMPERATURE)

    with torch.no_grad():
        seen = [teacher["backbone"].forward_features(crop) for crop in global_crops.split(B)]
        t1, t2 = targets("dino", torch.cat([teacher["dino_head"](f["x_norm_clstoken"]) for f in seen])).split(B)
        patches = torch.cat([f["x_norm_patchtokens"] for f in seen])  # [2B, 16, D]
        patch_targets = targets("ibot", teacher[patch_head](patches[masks]))

    crops = [
        student["backbone"].forward_features(x, m) for x, m in zip(global_crops.split(B), masks.split(B), strict=True)
    ]
    g1, g2 = (student["dino_head"](f["x_norm_clstoken"]) for f in crops)
    dino_global = cross_entropy(g1, t2) + cross_entropy(g2, t1)
    dino_local = torch.zeros((), dtype=torch.float64)
    L = len(batch["local_crops"]) // B
    for crop in batch["local_crops"].split(B) if L else ():
        logits = student["dino_head"](student["backbone"].forward_features(crop)["x_norm_clstoken"])
        dino_local = dino_local + cross_entropy(logits, t1) + cross_entropy(logits, t2)
    terms = 2 + max(2 * L, 1)

    koleo = sum(textbook_koleo(f["x_norm_clstoken"]) for f in crops)
    ibot = torch.zeros((), dtype=torch.float64)
    remaining = patch_targets
    for tokens, mask in zip(torch.cat([f["x_norm_patchtokens"] for f in crops]), masks, strict=True):
        if mask.any():
            own, remaining = remaining[: mask.sum()], remaining[mask.sum() :]
            ibot = ibot + cross_entropy(student[patch_head](tokens[mask]), own)
    ibot = ibot / (2 * B)

    total = (
        config.dino_weight * (dino_local + dino_global) / terms
        + config.koleo_weight * koleo
        + config.ibot_weight * ibot
    )
    return {
        "dino_local": dino_local / terms,
        "dino_global": dino_global / terms,
        "koleo": koleo,
        "ibot": ibot,
        "total": total,
    }


def gradients(losses: dict[str, Tensor], student: nn.ModuleDict) -> dict[str, Tensor]:
    names, parameters = zip(*student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(losses["total"], parameters, materialize_grads=True), strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("local", [2, 0])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
def test_two_steps_equal_the_formulas(centering: Any, separate: bool, local: int) -> None:
    objective = make_objective(ObjectiveConfig(centering=centering, ibot_weight=0.7, dino_weight=1.3), separate)
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


def test_heads_see_class_tokens_and_masked_patches_only() -> None:
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: rows.update({name: len(inputs[0])})

    for separate in (False, True):
        objective = make_objective(ObjectiveConfig(), separate)
        for role in ("student", "teacher"):
            for head, module in getattr(objective, role).items():
                module.register_forward_pre_hook(count(f"{role} {head} {separate}"))
        objective(random_batch(), TEMPERATURE)
    M = sum(MASKED)
    assert {key: n for key, n in rows.items() if "head" in key} == {
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
    objective.update_teacher(0.9)
    statistics = objective.collapse_statistics(batch["global_crops"], TEMPERATURE)
    assert all(value.is_meta and value.shape == () for value in (losses | statistics).values())
    with pytest.raises(NotImplementedError, match="nonzero"):
        objective(batch | {"masks": batch["masks"].to("meta")}, TEMPERATURE)


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
    objective.update_teacher(momentum)
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


def _two_processes(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    whole = random_batch(images=4)
    mine = {
        name: torch.cat([crop.split(2)[rank] for crop in tensor.split(4)]) for name, tensor in whole.items()
    }  # two images of each crop
    for centering, tolerance in (("softmax", 1e-10), ("sinkhorn_knopp", 1e-5)):  # log u passes through float32
        config = ObjectiveConfig(centering=centering)  # type: ignore[arg-type]
        split, single = make_objective(config, True, group=dist.group.WORLD), make_objective(config, True)
        for _ in range(2):  # the second step shows that the centres are the same
            losses, expected = split(mine, TEMPERATURE), single(whole, TEMPERATURE)
            actual = gradients(losses, split.student)
            for tensor in [*actual.values(), *losses.values()]:
                tensor.detach().div_(2)
                dist.all_reduce(tensor.detach())
            assert_close({name: loss.detach() for name, loss in losses.items()}, expected, tolerance)
            assert_close(actual, gradients(expected, single.student), tolerance)
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(_two_processes, args=(f"{tmp_path}/store",), nprocs=2)


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
    with pytest.raises(ValueError, match=r"batch too small for KoLeo: .* at least 2 of them, got 1"):
        make_objective(ObjectiveConfig(), False)(batch, TEMPERATURE)
    assert make_objective(ObjectiveConfig(koleo_weight=0), False)(batch, TEMPERATURE)["total"].isfinite()


def test_networks_that_do_not_fit_are_named() -> None:
    student, teacher = build_networks(VIT, HEAD)
    with pytest.raises(ValueError, match="teacher: expected modules backbone and dino_head, got backbone"):
        SelfDistillation(student, nn.ModuleDict({"backbone": teacher["backbone"]}), ObjectiveConfig())
    _, larger = build_networks(VIT, replace(HEAD, out_dim=25))
    with pytest.raises(ValueError, match=r"teacher: expected the student's parameters, .* dino_head.last_layer"):
        SelfDistillation(student, larger, ObjectiveConfig())
    with pytest.raises(ValueError, match=r"momentum: expected a number from 0 to 1, got 1\.5"):
        SelfDistillation(student, teacher, ObjectiveConfig()).update_teacher(1.5)
