"""What the tests of every backend share: inputs, the operators on a chunk beside their definition, and whole losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_kernels import soft_cross_entropy
from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels.prototype_cross_entropy import reference
from tests.tolerance import assert_at_most_twice_the_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


@dataclass(frozen=True)
class Case:
    """N students of D features, M teachers, K prototypes; J targets of each student, 0 for that of its own number.

    The logits reach ``magnitude``, and those of a chunk begin ``offset`` elements past a 16-byte boundary.
    """

    N: int
    M: int
    K: int
    D: int = 5
    J: int = 1
    magnitude: float = 1.0
    offset: int = 0

    def __str__(self) -> str:
        shape = f"{self.N}x{self.M}x{self.K}x{self.D}-J{self.J}"
        return shape + f"-{self.magnitude:g}" * (self.magnitude != 1) + "-unaligned" * (self.offset > 0)

    def random(self, *shape: int, seed: int, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed + 31 * self.N + self.K)
        return torch.randn(shape, dtype=torch.float64, device=device, generator=generator)

    def index(self, device: str = "cpu") -> Tensor | None:
        if self.J == 0:
            return None
        generator = torch.Generator(device).manual_seed(self.N)
        return torch.randint(max(self.M, 1), (self.N, self.J), device=device, generator=generator)

    def logits(self, rows: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
        values = (self.random(rows, self.K, seed=seed, device=device) * self.magnitude).clamp(-1e4, 1e4).to(dtype)
        storage = torch.empty(self.offset + values.numel(), dtype=dtype, device=device)
        return storage[self.offset :].view(values.shape).copy_(values)

    def loss_arguments(self, dtype: torch.dtype, device: str = "cpu", gain: bool = False) -> dict[str, Any]:
        """Arguments of the public function. A row of unit features and one of weight have a product of |weight|."""

        def random(*shape: int, seed: int) -> Tensor:
            return self.random(*shape, seed=seed, device=device)

        features = F.normalize(random(self.N, self.D, seed=1), dim=1)
        weight, factor = random(self.K, self.D, seed=2), random(self.K, 1, seed=3)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "features": features.to(dtype).requires_grad_(),
            "weight": (weight if gain else weight * self.magnitude).to(dtype).requires_grad_(),
            "weight_gain": (factor * self.magnitude).to(dtype).requires_grad_() if gain else None,
            "teacher_logits": self.logits(self.M, dtype, device, seed=4),
            "teacher_bias": random(self.K, seed=5).to(wide),
            "row_weight": random(self.N, seed=6).to(wide),
            "teacher_index": self.index(device),
            "student_temperature": STUDENT_TEMPERATURE,
            "teacher_temperature": TEACHER_TEMPERATURE,
        }


CASES = (
    Case(0, 0, 5),
    Case(1, 1, 1),
    Case(2, 1, 7, J=2),
    Case(5, 5, 1, J=0),
    Case(3, 4, 37),
    Case(5, 5, 128, J=0),
    Case(7, 3, 331, J=3),
    Case(6, 6, 331, J=0, offset=1),
    Case(4, 3, 1000, J=2, magnitude=1e4),
    Case(3, 2, 4099, magnitude=100.0),
)


def gradients_of(loss: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of what the loss [N] is a function of, for one direction."""
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    direction = torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype, device=loss.device)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), direction), strict=True))


def with_logits_in_memory(
    features: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    *,
    teacher_index: Tensor | None,
    weight_gain: Tensor | None = None,
    row_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """F.linear, as DINOHead's last layer has it, and soft_cross_entropy: once for each of a row's J targets."""
    if weight_gain is not None:
        weight = weight_gain.view(-1, 1) * F.normalize(weight, dim=1)
    logits = F.linear(features, weight)
    rows = [slice(None)] if teacher_index is None else teacher_index.unbind(1)
    losses = [soft_cross_entropy(logits, teacher_logits[r], row_weight=row_weight, **options) for r in rows]
    return torch.stack(losses).sum(dim=0)


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return {name: convert(x) for name, x in arguments.items()}


def chunk_arguments(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, tuple[Any, ...]]:
    """Per operator on a chunk, its arguments as they follow each other. The first is overwritten by all but one."""
    student, teacher = (case.logits(rows, dtype, device, seed) for rows, seed in ((case.N, 1), (case.M, 2)))
    wide = accumulation_dtype(teacher)
    # The teacher's columns are a part of longer rows, as in a loop over chunks.
    teacher = torch.cat([teacher, teacher[:, :3]], dim=1)[:, : case.K]
    bias = case.random(case.K, seed=3, device=device).to(wide)
    norm = reference.prototype_target_norm(teacher.double(), bias.double(), TEACHER_TEMPERATURE).to(wide)
    targets = torch.empty(case.M, case.K, dtype=wide, device=device)
    reference.prototype_targets_(targets, teacher, bias, norm, TEACHER_TEMPERATURE)
    index, scale = case.index(device), case.random(case.N, seed=4, device=device).to(wide)
    state, earlier, complete = (reference.initial_state(case.N, student) for _ in range(3))
    reference.prototype_accumulate_(earlier, student.flip(1) / 2, targets, index, STUDENT_TEMPERATURE)
    reference.prototype_accumulate_(complete, student, targets, index, STUDENT_TEMPERATURE)
    return {
        "prototype_target_norm": (teacher, bias, TEACHER_TEMPERATURE),
        "prototype_targets_": (torch.empty_like(targets), teacher, bias, norm, TEACHER_TEMPERATURE),
        "prototype_accumulate_": (state, student, targets, index, STUDENT_TEMPERATURE),
        "prototype_accumulate_ (more)": (earlier, student, targets, index, STUDENT_TEMPERATURE),
        "prototype_gradient_": (student, complete, targets, index, scale, STUDENT_TEMPERATURE),
    }


def run_chunk_operator(operators: Any, name: str, arguments: tuple[Any, ...]) -> Tensor:
    """What the operator returns, or makes of a copy of its first argument."""
    first, *rest = arguments
    first = first.clone() if name.endswith("_") else first
    result = getattr(operators, name)(first, *rest)
    return first if result is None else result


def assert_matches_reference(operators: Any, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The four operators on a chunk: of ``torch.ops.dinov2_kernels``, or of a module."""
    for label, arguments in chunk_arguments(case, dtype, device).items():
        name = label.partition(" ")[0]
        plain = run_chunk_operator(reference, name, arguments)
        wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
        exact = run_chunk_operator(reference, name, wide)
        result = run_chunk_operator(operators, name, arguments)
        assert result.dtype == plain.dtype, label
        assert not result.isnan().any(), f"{label}: NaN, or an element that was never written"
        # Rows of norm and state are quantities of their own, each with its own scale.
        apart = name in ("prototype_target_norm", "prototype_accumulate_")
        for i, (r, p, e) in enumerate(zip(result, plain, exact, strict=True) if apart else [(result, plain, exact)]):
            largest = float(e.abs().max()) if e.numel() else 0.0
            eps = torch.finfo(accumulation_dtype(result)).eps
            # In float64, z = t / T + bias and (s - S) / T are rounded alike in both, so allow what the rounding makes.
            rounding = case.magnitude * 5 / TEACHER_TEMPERATURE if dtype == torch.float64 else 0.0
            assert_at_most_twice_the_error(f"{label}[{i}]", r, p, e, 8 * eps * (1 + rounding) * max(largest, 1e-30))


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: a chunk of DINOv2's 65536 prototypes, and an odd one."""
    from dinov2_kernels.prototype_cross_entropy import triton_kernel

    N, M = 1024, 128
    for dtype in DTYPES:
        for c in (4096, 4099):
            student, teacher = (torch.empty(rows, c, dtype=dtype, device="meta") for rows in (N, M))
            wide = accumulation_dtype(student)
            bias, targets = torch.empty(c, dtype=wide, device="meta"), torch.empty(M, c, dtype=wide, device="meta")
            norm, state = torch.empty(2, M, dtype=wide, device="meta"), torch.empty(4, N, dtype=wide, device="meta")
            yield triton_kernel.prototype_target_norm(teacher, bias, 0.04)
            yield triton_kernel.prototype_targets_(targets, teacher, bias, norm, 0.04)
            for index in (None, torch.empty(N, 2, dtype=torch.int64, device="meta")):
                yield triton_kernel.prototype_accumulate_(state, student, targets, index, 0.1)
                yield triton_kernel.prototype_gradient_(student, state, targets, index, state[0], 0.1)
