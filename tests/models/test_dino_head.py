"""The projection head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.models import DINOHead


def test_parameter_names_and_shapes() -> None:
    head = DINOHead(16, 50, hidden_dim=24, bottleneck_dim=8)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "mlp.0.weight": (24, 16),
        "mlp.0.bias": (24,),
        "mlp.2.weight": (24, 24),
        "mlp.2.bias": (24,),
        "mlp.4.weight": (8, 24),
        "mlp.4.bias": (8,),
        "last_layer.weight_g": (50, 1),
        "last_layer.weight_v": (50, 8),
    }
    assert all(p.requires_grad for p in head.parameters())


def test_one_layer_is_not_wrapped() -> None:
    assert "mlp.weight" in DINOHead(16, 50, bottleneck_dim=8, num_layers=1).state_dict()


def test_scores_are_those_of_torch_weight_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2.models.dino_head.ROWS", 16)  # gradients come in several slices
    head = DINOHead(16, 50, hidden_dim=24, bottleneck_dim=8).double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2.0)
    last = nn.utils.parametrizations.weight_norm(nn.Linear(8, 50, bias=False).double())
    last.load_state_dict(
        {
            "parametrizations.weight.original0": head.last_layer.weight_g,
            "parametrizations.weight.original1": head.last_layer.weight_v,
        }
    )
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = last(F.normalize(head.mlp(x), dim=-1))
    scores = head(x)
    torch.testing.assert_close(scores, expected)
    ours = torch.autograd.grad(scores.square().sum(), [head.last_layer.weight_g, head.last_layer.weight_v])
    theirs = torch.autograd.grad(expected.square().sum(), list(last.parameters()))
    torch.testing.assert_close(ours, theirs)


def test_initial_scores_are_cosines() -> None:
    head = DINOHead(16, 50, hidden_dim=24, bottleneck_dim=8)
    x = torch.randn(7, 16)
    expected = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), expected)


def test_initial_values() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        head = DINOHead(64, 500, hidden_dim=256, bottleneck_dim=64)
    head.to_empty(device="cpu")
    head.init_weights()
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.mlp[2].bias.eq(0).all()
    assert head.last_layer.weight_g.eq(1).all()
    assert 0.99 / 8 < head.last_layer.weight_v.abs().max() <= 1 / 8  # the default of nn.Linear: uniform


def test_no_rows() -> None:
    assert DINOHead(16, 50, hidden_dim=24, bottleneck_dim=8)(torch.zeros(0, 16)).shape == (0, 50)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        DINOHead(16, 50, num_layers=0)
