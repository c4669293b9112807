"""Soft-target cross-entropy: values, gradients, precision, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_kernels import sinkhorn_bias
from dinov2_kernels.cross_entropy import soft_cross_entropy


def golden_logits(scale: float = 1.0) -> Tensor:
    return (torch.sin(1.7 * torch.arange(48, dtype=torch.float64) + 0.3) * scale).float().view(6, 8)


def random_logits(N: int, K: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(
    student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float, bias: Tensor
) -> Tensor:
    """The loss from exponentials and their sums, without softmax functions; for logits of order 1."""
    weights = torch.exp(teacher / teacher_temperature + bias)
    targets = weights / weights.sum(dim=1, keepdim=True)
    scaled = student / student_temperature
    return torch.exp(scaled).sum(dim=1).log() - (targets * scaled).sum(dim=1)


def test_golden_values() -> None:
    teacher, student = golden_logits(), golden_logits(0.7).flip(0)
    temperatures: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    bias = sinkhorn_bias(teacher, 0.07)
    loss = soft_cross_entropy(student, teacher, teacher_bias=bias, **temperatures)
    assert loss.mean().item() == pytest.approx(6.903269, abs=1e-5)
    pairs = [
        soft_cross_entropy(s, t, teacher_bias=bias, **temperatures).mean()
        for s in student.chunk(2)
        for t in teacher.chunk(2)
    ]
    assert sum(pairs).item() == pytest.approx(28.511141, abs=1e-5)
    # iBOT with the mask [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]: two images have masked patches, three count.
    weight = torch.tensor([1 / 2, 1 / 2, 1.0])
    ibot = soft_cross_entropy(student[:3], teacher[:3], teacher_bias=bias, row_weight=weight, **temperatures)
    assert (ibot.sum() / 3).item() == pytest.approx(3.768659, abs=1e-5)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1, 9), (5, 1), (4, 7), (33, 257)])
def test_equals_the_formula(N: int, K: int) -> None:
    student, teacher, bias = random_logits(N, K), random_logits(N, K, 1), random_logits(1, K, 2)[0]
    weight = random_logits(1, N, 3)[0]
    loss = soft_cross_entropy(
        student, teacher, student_temperature=0.3, teacher_temperature=0.2, teacher_bias=bias, row_weight=weight
    )
    expected = by_hand(student, teacher, 0.3, 0.2, bias) * weight
    assert loss.shape == (N,)
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=1e-11)


def test_bias_and_weight_are_optional() -> None:
    student, teacher = random_logits(4, 7), random_logits(4, 7, 1)
    loss = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.07)
    torch.testing.assert_close(loss, by_hand(student, teacher, 0.1, 0.07, torch.zeros(7)), atol=1e-11, rtol=1e-11)


def test_gradient_is_the_derivative_and_reaches_the_student_alone() -> None:
    student, teacher = random_logits(4, 7).requires_grad_(), random_logits(4, 7, 1).requires_grad_()
    bias, weight = random_logits(1, 7, 2)[0].requires_grad_(), random_logits(1, 4, 3)[0]

    def loss(student: Tensor) -> Tensor:
        return soft_cross_entropy(
            student, teacher, student_temperature=0.5, teacher_temperature=0.3, teacher_bias=bias, row_weight=weight
        )

    assert torch.autograd.gradcheck(loss, student)
    loss(student).sum().backward()
    assert teacher.grad is None
    assert bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_reduced_in_float32(dtype: torch.dtype) -> None:
    student, teacher = random_logits(16, 1000, 0, dtype), random_logits(16, 1000, 1, dtype)
    loss = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.07)
    expected = by_hand(student.double(), teacher.double(), 0.1, 0.07, torch.zeros(1000))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=2e-5, rtol=2e-6)


def test_autocast_changes_nothing() -> None:
    student, teacher = random_logits(8, 33, 0, torch.float32), random_logits(8, 33, 1, torch.float32)
    outside = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.07)
    with torch.autocast("cpu", torch.bfloat16):
        inside = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.07)
    assert torch.equal(inside, outside)


def test_huge_logits_stay_finite() -> None:
    student, teacher = 1e4 * random_logits(8, 33, 0, torch.float32), 1e4 * random_logits(8, 33, 1, torch.float32)
    loss = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.04)
    assert loss.isfinite().all()


def test_no_rows_give_no_losses() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = soft_cross_entropy(student, torch.zeros(0, 5), student_temperature=0.1, teacher_temperature=0.07)
    assert loss.shape == (0,)
    assert loss.sum().item() == 0


def test_uniform_logits_give_the_logarithm_of_the_prototypes() -> None:
    loss = soft_cross_entropy(torch.zeros(3, 64), torch.ones(3, 64), student_temperature=0.1, teacher_temperature=0.07)
    torch.testing.assert_close(loss, torch.full((3,), math.log(64)))


def test_compiles_without_a_graph_break() -> None:
    student, teacher = random_logits(8, 33, 0, torch.float32), random_logits(8, 33, 1, torch.float32)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.07)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": torch.zeros(4)}, ValueError, r"student_logits: expected shape \[N, K\] .* got \[4\]"),
        ({"student_logits": torch.zeros(4, 0)}, ValueError, r"student_logits: expected .* K >= 1, got \[4, 0\]"),
        ({"teacher_logits": torch.zeros(4, 6)}, ValueError, r"teacher_logits: expected shape \[4, 7\] .* got \[4, 6\]"),
        ({"teacher_logits": torch.zeros(4, 7, dtype=torch.int32)}, TypeError, "teacher_logits: .* got torch.int32"),
        ({"teacher_bias": torch.zeros(4)}, ValueError, r"teacher_bias: expected shape \[7\] .* got \[4\]"),
        ({"row_weight": torch.zeros(7)}, ValueError, r"row_weight: expected shape \[4\] .* got \[7\]"),
        ({"student_temperature": 0}, ValueError, "student_temperature: expected a number above 0, got 0"),
        ({"teacher_temperature": -0.1}, ValueError, "teacher_temperature: expected a number above 0, got -0.1"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "student_logits": torch.zeros(4, 7),
        "teacher_logits": torch.zeros(4, 7),
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
    }
    with pytest.raises(error, match=message):
        soft_cross_entropy(**(arguments | changes))
