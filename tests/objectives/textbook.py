"""The objective once more, as papers write it: crop by crop and image by image, every matrix stored, in float64."""

from __future__ import annotations

from typing import Any

import torch
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


def textbook_step(
    objective: SelfDistillation, batch: Batch, centers: dict[str, Tensor], hidden: bool = True
) -> dict[str, Tensor]:
    """The losses of one step, crop by crop and image by image; moves ``centers`` as the step does.

    hidden: whether the student does not see the masked patches.
    """
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
        student["backbone"].forward_features(x, m if hidden else None)
        for x, m in zip(global_crops.split(B), masks.split(B), strict=True)
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
