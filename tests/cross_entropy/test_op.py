"""Soft-target cross-entropy as users call it: values, gradients, precision, PyTorch's machinery, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_kernels import sinkhorn_bias
from dinov2_kernels.cross_entropy import soft_cross_entropy
from tests.cross_entropy.cases import CASES, Case


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


def test_students_share_teachers_by_index() -> None:
    student, teacher, bias = random_logits(5, 9), random_logits(3, 9, 1), random_logits(1, 9, 2)[0]
    index = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 1], [2, 0]])
    options: dict[str, Any] = {"student_temperature": 0.3, "teacher_temperature": 0.2, "teacher_bias": bias}
    loss = soft_cross_entropy(student, teacher, teacher_index=index, **options)
    expected = sum(by_hand(student, teacher[index[:, j]], 0.3, 0.2, bias) for j in range(2))
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=1e-11)
    for one in (index[:, 0], index[:, :1].int()):
        loss = soft_cross_entropy(student, teacher, teacher_index=one, **options)
        torch.testing.assert_close(loss, by_hand(student, teacher[index[:, 0]], 0.3, 0.2, bias), atol=1e-11, rtol=1e-11)


def test_gradient_with_shared_teachers_is_the_derivative() -> None:
    student, teacher = random_logits(4, 7).requires_grad_(), random_logits(3, 7, 1)
    index, weight = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1]]), random_logits(1, 4, 3)[0]

    def loss(student: Tensor) -> Tensor:
        options: dict[str, Any] = {"student_temperature": 0.5, "teacher_temperature": 0.3}
        return soft_cross_entropy(student, teacher, teacher_index=index, row_weight=weight, **options)

    assert torch.autograd.gradcheck(loss, student)


def test_the_gradient_may_overwrite_the_logits() -> None:
    leaf, teacher = random_logits(6, 50, 0, torch.float32).requires_grad_(), random_logits(6, 50, 1, torch.float32)
    options: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    (expected,) = torch.autograd.grad(soft_cross_entropy(leaf, teacher, **options).sum(), leaf)
    logits = leaf * 1
    loss = soft_cross_entropy(logits, teacher, overwrite_student_logits=True, **options)
    loss.sum().backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
    for unmade in (leaf, leaf[:6]):
        with pytest.raises(ValueError, match="expected logits of a layer, got a leaf that requires a gradient"):
            soft_cross_entropy(unmade, teacher, overwrite_student_logits=True, **options)


def test_padding_rows_are_left_out_by_slicing() -> None:
    student, teacher = torch.full((2, 9, 20), torch.nan)
    student[:6], teacher[:6] = random_logits(6, 20), random_logits(6, 20, 1)
    options: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    loss = soft_cross_entropy(student[:6], teacher[:6], **options)
    assert torch.equal(loss, soft_cross_entropy(student[:6].clone(), teacher[:6].clone(), **options))


def test_strides_change_nothing() -> None:
    student, teacher = random_logits(9, 6).T, random_logits(9, 6, 1).T
    options: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    expected = soft_cross_entropy(student.contiguous(), teacher.contiguous(), **options)
    assert torch.equal(soft_cross_entropy(student, teacher, **options), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[6]], ids=str)
@pytest.mark.parametrize("name", ["", "_backward", "_backward_"])
def test_opcheck(name: str, case: Case) -> None:
    arguments = case.arguments(torch.float32)
    loss, *norms = torch.ops.dinov2_kernels.soft_cross_entropy(*arguments)
    if name == "_backward":
        arguments = [loss, *arguments, *norms]
    elif name == "_backward_":
        arguments = [arguments[0], loss, *arguments[1:], *norms]
    torch.library.opcheck(getattr(torch.ops.dinov2_kernels, f"soft_cross_entropy{name}").default, arguments)


@pytest.mark.parametrize("overwrite", [False, True])
def test_compiles_forward_and_backward(overwrite: bool) -> None:
    leaf, teacher = random_logits(8, 33, 0, torch.float32).requires_grad_(), random_logits(8, 33, 1, torch.float32)

    def loss(leaf: Tensor, teacher: Tensor) -> Tensor:
        options: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.07}
        return soft_cross_entropy(leaf * 2, teacher, overwrite_student_logits=overwrite, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(leaf, teacher), leaf)
    result = compiled(leaf, teacher)
    for _ in range(
        2
    ):  # eager mode refuses the second pass if logits are overwritten; compiled graphs have no such error
        (gradient,) = torch.autograd.grad(result, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


def test_compiled_losses_may_share_their_logits() -> None:
    leaf, teacher = random_logits(8, 33, 0, torch.float32).requires_grad_(), random_logits(8, 33, 1, torch.float32)

    def loss(leaf: Tensor, overwrite: bool) -> Tensor:
        logits = leaf * 2
        options: dict[str, Any] = {"teacher_temperature": 0.07, "overwrite_student_logits": overwrite}
        first = soft_cross_entropy(logits, teacher, student_temperature=0.1, **options)
        second = soft_cross_entropy(logits, teacher.flip(0), student_temperature=0.2, **options)
        return (first + second + logits.logsumexp(dim=1)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(leaf, False), leaf)
    (gradient,) = torch.autograd.grad(compiled(leaf, True), leaf)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": torch.zeros(4)}, ValueError, r"student_logits: expected shape \[N, K\] .* got \[4\]"),
        ({"student_logits": torch.zeros(4, 0)}, ValueError, r"student_logits: expected .* K >= 1, got \[4, 0\]"),
        ({"teacher_logits": torch.zeros(4, 6)}, ValueError, r"teacher_logits: expected shape \[4, 7\] .* got \[4, 6\]"),
        ({"teacher_logits": torch.zeros(4, 7, dtype=torch.int32)}, TypeError, "teacher_logits: .* got torch.int32"),
        ({"teacher_logits": torch.zeros(4, 7).double()}, TypeError, "teacher_logits: expected float64 if and only if"),
        ({"teacher_index": torch.zeros(4)}, TypeError, "teacher_index: expected integers, got torch.float32"),
        ({"teacher_index": torch.zeros(3).long()}, ValueError, r"teacher_index: expected shape \[4\] or .* got \[3\]"),
        ({"teacher_index": torch.tensor([0, 4, 1, 2])}, ValueError, "teacher_index: .* rows from 0 to 3, got 4"),
        ({"teacher_index": torch.tensor([0, 3, -1, 2])}, ValueError, "teacher_index: .* rows from 0 to 3, got -1"),
        ({"row_weight": torch.tensor([1, 2, torch.nan, 1])}, ValueError, "row_weight: .* got NaN in row 2"),
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
