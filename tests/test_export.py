"""Every public function in a program of torch.export and in a trace: right for other numbers of rows and strides."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dinov2_kernels as dk
from dinov2_kernels import PackedLayout

LENGTH, HEADS, WIDTH = 3, 2, 8
PROTOTYPES = torch.linspace(-1, 1, 12 * WIDTH).view(12, WIDTH)


def layout_of(x: Tensor) -> PackedLayout:
    return PackedLayout([(x.shape[0] // LENGTH, LENGTH)])


def attention(x: Tensor) -> Tensor:  # x: [T, 6 * WIDTH]
    return dk.varlen_attention_qkvpacked(x.unflatten(1, (3, HEADS, WIDTH)), layout_of(x))


def attention_of_three(x: Tensor) -> Tensor:
    return dk.varlen_attention(*x.unflatten(1, (3, HEADS, WIDTH)).unbind(1), layout_of(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return dk.stochastic_depth(x, layout_of(x), lambda tokens, _: tokens.sin(), drop_rate=0.0, norm=self.norm)


def cross_entropy(x: Tensor) -> Tensor:
    student, teacher = x.chunk(2, dim=1)
    return dk.soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.05)


def prototype_cross_entropy(x: Tensor) -> Tensor:
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    return dk.prototype_cross_entropy(x[:, :WIDTH], PROTOTYPES, x[:, WIDTH : WIDTH + 12], **temperatures)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "varlen_attention_qkvpacked": attention,
    "varlen_attention": attention_of_three,
    "stochastic_depth": Residual(),
    "swiglu": dk.swiglu,
    "soft_cross_entropy": cross_entropy,
    "prototype_cross_entropy": prototype_cross_entropy,
    "sinkhorn_knopp": lambda x: dk.sinkhorn_knopp(x, 0.07),
    "sinkhorn_bias": lambda x: dk.sinkhorn_bias(x, 0.07),
    "koleo_loss": dk.koleo_loss,
    "nearest_neighbors": lambda x: dk.nearest_neighbors(x, 2)[1],
}


class Calling(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_serves_other_rows_and_strides(name: str, strict: bool) -> None:
    function, sequences = FUNCTIONS[name], torch.export.Dim("sequences", min=2)
    example = torch.randn(4 * LENGTH, 48)
    program = torch.export.export(
        Calling(function), (example,), dynamic_shapes=({0: LENGTH * sequences},), strict=strict
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    loaded = torch.export.load(io.BytesIO(saved.getvalue()))
    for count in (4, 2, 7):
        x = torch.randn(count * LENGTH, 48)
        for of_other_strides in (x, x.t().contiguous().t(), torch.stack([x, x], dim=2)[..., 0]):
            for exported in (program.module(), loaded.module()):
                torch.testing.assert_close(exported(of_other_strides), function(x))


def test_a_program_serves_factors_and_biases_of_other_strides() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, gamma: Tensor, bias: Tensor) -> Tensor:
            options = {"drop_rate": 0.0, "gamma": gamma, "bias": bias}
            return dk.stochastic_depth(x, layout_of(x), lambda tokens, _: tokens.sin(), **options)

    x, vectors = torch.randn(4 * LENGTH, 48), torch.randn(48, 2)
    program = torch.export.export(Scaled(), (x, torch.randn(48), torch.randn(48))).module()
    torch.testing.assert_close(program(x, *vectors.unbind(1)), Scaled()(x, *vectors.unbind(1)))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and traces warn of every check of a size
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_serves_other_rows(name: str) -> None:
    function = Calling(FUNCTIONS[name])
    traced = torch.jit.trace(function, torch.randn(4 * LENGTH, 48), check_trace=False)
    for count in (4, 2, 7):
        x = torch.randn(count * LENGTH, 48)
        torch.testing.assert_close(traced(x), function(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_refuses_offsets_and_stochastic_depth() -> None:
    offsets = torch.tensor([0, 3, 12], dtype=torch.int32)
    of_offsets = Calling(lambda x: dk.varlen_attention(*x.unflatten(1, (3, HEADS, WIDTH)).unbind(1), offsets))
    with pytest.raises(
        NotImplementedError, match=r"layout: expected a PackedLayout in torch\.jit\.trace and ONNX export"
    ):
        torch.jit.trace(of_offsets, torch.randn(12, 48))
    dropping = Calling(lambda x: dk.stochastic_depth(x, layout_of(x), lambda tokens, _: tokens, drop_rate=0.3))
    with pytest.raises(NotImplementedError, match="stochastic depth: expected a model in eval mode"):
        torch.jit.trace(dropping, torch.randn(12, 48))
