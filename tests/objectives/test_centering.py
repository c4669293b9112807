"""The two centrings as modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov2.objectives import ObjectiveConfig
from dinov2.objectives.losses import SinkhornCentering, SoftmaxCentering, make_centering
from dinov2_kernels import sinkhorn_bias


def golden_logits() -> torch.Tensor:
    return torch.sin(1.7 * torch.arange(48, dtype=torch.float64) + 0.3).float().view(6, 8)


def test_golden_centre_after_one_update() -> None:
    centering = SoftmaxCentering(8, momentum=0.9)
    centering.update(golden_logits(), nn.Identity())
    expected = torch.tensor([0.00035, -0.001361, 1e-6, 0.001361, -0.000352, -0.00127, 0.000679, 0.001095])
    torch.testing.assert_close(centering.center, expected, atol=1e-6, rtol=0)


def test_the_centre_is_a_moving_average_subtracted_before_the_temperature() -> None:
    centering = SoftmaxCentering(8, momentum=0.8)
    center = torch.zeros(8)
    for step in range(3):
        logits = golden_logits() + step
        torch.testing.assert_close(centering(logits, 0.05), -center / 0.05)
        centering.update(logits, nn.Identity())
        center = 0.8 * center + 0.2 * logits.mean(dim=0)
    torch.testing.assert_close(centering.center, center)


def test_the_mean_logits_are_those_of_the_mean_feature() -> None:
    features = torch.randn(7, 3, dtype=torch.float64)
    prototypes = nn.Linear(3, 8, bias=False).double()
    centering = SoftmaxCentering(8, momentum=0.8).double()
    centering.update(features, prototypes)
    torch.testing.assert_close(centering.center, 0.2 * prototypes(features).mean(dim=0).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_centre_is_averaged_in_float32(dtype: torch.dtype) -> None:
    centering = SoftmaxCentering(1, momentum=0.0)
    centering.update(torch.ones(5001, 1, dtype=dtype).index_fill(0, torch.tensor(0), 2.0), nn.Identity())
    assert centering.center.dtype == torch.float32
    assert centering.center.item() == pytest.approx(5002 / 5001, rel=1e-6)


def test_no_rows_leave_the_centre_alone() -> None:
    centering = SoftmaxCentering(8, momentum=0.9)
    centering.update(golden_logits(), nn.Identity())
    before = centering.center.clone()
    centering.update(golden_logits()[:0], nn.Identity())
    assert torch.equal(centering.center, before)


def test_sinkhorn_centering_is_the_bias_and_remembers_nothing() -> None:
    centering = SinkhornCentering(n_iterations=2)
    centering.update(golden_logits(), nn.Identity())
    expected = sinkhorn_bias(golden_logits(), 0.07, n_iterations=2)
    torch.testing.assert_close(centering(golden_logits(), 0.07), expected, atol=0, rtol=0)
    assert not centering.state_dict()


def test_the_configuration_names_the_centering() -> None:
    softmax = make_centering(ObjectiveConfig(center_momentum=0.7), 5, None)
    assert isinstance(softmax, SoftmaxCentering)
    assert (softmax.momentum, softmax.center.shape) == (0.7, (5,))
    sinkhorn = make_centering(ObjectiveConfig(centering="sinkhorn_knopp", sinkhorn_iterations=4), 5, None)
    assert isinstance(sinkhorn, SinkhornCentering)
    assert sinkhorn.n_iterations == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("centering", "sinkhorn", "centering: expected one of softmax, sinkhorn_knopp, got 'sinkhorn'"),
        ("student_logits", "none", "student_logits: expected one of stored, recomputed, got 'none'"),
        ("student_temperature", 0.0, "student_temperature: expected a number above 0, got 0.0"),
        ("koleo_weight", -0.1, "koleo_weight: expected a number of at least 0, got -0.1"),
        ("dino_weight", float("nan"), "dino_weight: expected a number of at least 0, got nan"),
        ("center_momentum", 1.1, "center_momentum: expected a number from 0 to 1, got 1.1"),
        ("sinkhorn_iterations", 0, "sinkhorn_iterations: expected at least 1, got 0"),
    ],
)
def test_wrong_configuration_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**{field: value})  # type: ignore[arg-type]
