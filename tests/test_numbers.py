"""NumPy's numbers as arguments: they count as Python's, and what is no number is refused in our own words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dinov2_kernels as dk
from dinov2.models import VisionTransformer, ViTConfig, load_pretrained, save_pretrained

LOGITS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
QUERIES = LOGITS.view(6, 2, 4)
LAYOUT = dk.PackedLayout([(2, 3)])
SOFT = {"student_temperature": 0.1, "teacher_temperature": 0.05}
CALLS: dict[str, tuple[Callable[[Any], Tensor], Any]] = {
    "scale": (lambda value: dk.varlen_attention(QUERIES, QUERIES, QUERIES, LAYOUT, scale=value), 0.5),
    "drop_rate": (lambda value: dk.stochastic_depth(LOGITS, LAYOUT, lambda x, _: x, drop_rate=value), 0.0),
    "temperature": (lambda value: dk.sinkhorn_knopp(LOGITS, value), 0.5),
    "n_iterations": (lambda value: dk.sinkhorn_bias(LOGITS, 0.5, n_iterations=value), 2),
    "student_temperature": (
        lambda value: dk.soft_cross_entropy(LOGITS, LOGITS, **{**SOFT, "student_temperature": value}),
        0.5,
    ),
    "eps": (lambda value: dk.koleo_loss(LOGITS, eps=value), 0.5),
    "k": (lambda value: dk.nearest_neighbors(LOGITS, value)[1], 2),
}


@pytest.mark.parametrize("argument", CALLS)
def test_operators_take_them(argument: str) -> None:
    call, value = CALLS[argument]
    for kind in (np.int64, np.uint8) if isinstance(value, int) else (np.float64, np.float32, np.float16):
        torch.testing.assert_close(call(kind(value)), call(value), rtol=0, atol=0)


@pytest.mark.parametrize("argument", ["n_iterations", "k"])
@pytest.mark.parametrize("value", [2.0, 1.9, np.float32(1.9), np.float64(2), "2", None], ids=repr)
def test_what_is_no_whole_number(argument: str, value: Any) -> None:
    """PyTorch would cut off what follows the point of NumPy's float32."""
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got "):
        CALLS[argument][0](value)


@pytest.mark.parametrize("argument", ["temperature", "student_temperature", "eps"])
@pytest.mark.parametrize("value", [np.float32("nan"), np.float32(-1), np.int64(0), "0.1", None], ids=repr)
def test_what_is_no_number_above_0(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: expected a number above 0, got "):
        CALLS[argument][0](value)


def test_layouts() -> None:
    expected = dk.PackedLayout([(2, 5), (3, 1)])
    for runs in (np.array([[2, 5], [3, 1]]), [(np.int32(2), np.int64(5)), [3, np.uint8(1)]]):
        layout = dk.PackedLayout(runs)
        assert layout == expected
        assert {type(n) for n in layout.flat_runs} == {int}


@pytest.mark.parametrize(
    "runs", [5, [5], [(2.0, 5)], [(np.float32(2), 5)], [(-1, 5)], [(torch.tensor(2), 5)], ["25"]], ids=repr
)
def test_what_is_no_layout(runs: Any) -> None:
    with pytest.raises(ValueError, match=r"runs: expected pairs \(count, length\) of integers >= 0, got"):
        dk.PackedLayout(runs)


def test_models(tmp_path: Any) -> None:
    sizes: dict[str, Any] = {"img_size": np.int32(28), "embed_dim": np.uint16(64), "depth": np.int64(2)}
    config = ViTConfig(**sizes, num_heads=np.int8(1), mlp_ratio=np.float32(2), drop_path_rate=np.float64(0.1))
    assert {type(value) for value in vars(config).values()} <= {int, float, bool, str}
    model = VisionTransformer(config).eval()
    assert load_pretrained(save_pretrained(model, tmp_path)).config == config
    x = torch.randn(1, 3, 28, 28)
    (last,) = model.get_intermediate_layers(x, np.int64(1))
    torch.testing.assert_close(model.get_intermediate_layers(x, np.array([0, 1]))[1], last)
    for wrong in (1.0, np.float32(1), "1", None, 3, [0, 2], [0.5], np.zeros((2, 2))):
        with pytest.raises(ValueError, match="n: expected 1 to 2 blocks or indices from 0 to 1, got"):
            model.get_intermediate_layers(x, wrong)
    with pytest.raises(ValueError, match=r"vit\.mlp_ratio: expected a finite number, got inf"):
        ViTConfig(mlp_ratio=float("inf"))
    with pytest.raises(ValueError, match=r"architecture: expected one of .*, got 3"):
        ViTConfig.of(3)  # type: ignore[arg-type]
