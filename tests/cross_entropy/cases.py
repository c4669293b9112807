"""What the tests of every backend share: inputs, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels.cross_entropy import reference
from tests.tolerance import assert_at_most_twice_the_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """N students facing J of M teachers each, with K logits, normal times magnitude.

    J = 0 pairs row n with row n. `shared`: students face few teachers, in groups. `plain`: neither bias nor weight.
    """

    N: int
    M: int
    K: int
    J: int = 1
    magnitude: float = 1.0
    teacher_temperature: float = 0.07
    shared: bool = False
    plain: bool = False

    def __str__(self) -> str:
        extra = "-shared" * self.shared + "-plain" * self.plain + f"-{self.magnitude:g}" * (self.magnitude != 1)
        return f"{self.N}x{self.M}x{self.K}-J{self.J}{extra}"

    def arguments(self, dtype: torch.dtype, device: str = "cpu", teacher_dtype: torch.dtype | None = None) -> list[Any]:
        """What the forward operator takes."""
        generator = torch.Generator(device).manual_seed(self.N + 31 * self.M + self.K)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, device=device, generator=generator)

        student, teacher = ((normal(rows, self.K) * self.magnitude).clamp(-1e4, 1e4) for rows in (self.N, self.M))
        narrow = accumulation_dtype(student.to(dtype))
        high = 2 if self.shared else self.M
        index = torch.randint(high, (self.N, self.J), device=device, generator=generator) if self.J else None
        bias, weight = normal(self.K).to(narrow), (normal(self.N) + 2).to(narrow)
        optional = [None, None] if self.plain else [bias, weight]
        logits = [student.to(dtype), teacher.to(teacher_dtype or dtype)]
        return [*logits, index, *optional, 0.1, self.teacher_temperature]


CASES = (
    Case(0, 0, 5, J=0),
    Case(0, 3, 5),
    Case(1, 1, 1),
    Case(1, 1, 7, J=0),
    Case(5, 5, 7, J=0, plain=True),
    Case(3, 2, 16),
    Case(7, 4, 1000, J=2),
    Case(21, 9, 331, shared=True),
    Case(9, 3, 129, J=3),
    Case(4, 4, 4099, J=2, plain=True),
    Case(8, 6, 600, J=2, magnitude=1e4, teacher_temperature=0.04),
    Case(2, 2, 9001, J=0, magnitude=1e4, teacher_temperature=0.04),
)


def assert_matches_reference(
    operators: Any, case: Case, dtype: torch.dtype, device: str = "cpu", teacher_dtype: torch.dtype | None = None
) -> None:
    """All operators: of ``torch.ops.dinov2_kernels``, or of a module."""
    arguments = case.arguments(dtype, device, teacher_dtype)
    exact_arguments = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    exact = reference.soft_cross_entropy(*exact_arguments)
    plain = reference.soft_cross_entropy(*arguments)
    loss, *norms = operators.soft_cross_entropy(*arguments)
    eps = torch.finfo(loss.dtype).eps
    largest = 1 + float(exact[0].abs().max()) if case.N else 1.0
    assert loss.dtype == accumulation_dtype(arguments[0])
    assert not loss.isnan().any()
    # In float64 the reference is no more exact than the kernel: both round x / T.
    floor = 64 * eps * (largest + 10 * case.magnitude / case.teacher_temperature * (dtype == torch.float64))
    assert_at_most_twice_the_error("loss", loss, plain[0], exact[0], floor)
    assert [norm.shape for norm in norms] == [(case.N, 2), (case.M, 2)]

    grad = torch.linspace(-1, 2, case.N, dtype=loss.dtype, device=device)
    student, *constants = arguments
    define = reference.soft_cross_entropy_backward
    exact_gradient = define(grad.double(), *exact_arguments, *exact[1:])
    plain_gradient = define(grad, *arguments, *plain[1:])
    gradient = operators.soft_cross_entropy_backward(grad, *arguments, *norms)
    assert gradient.dtype == dtype
    assert not gradient.isnan().any()
    sharp = case.magnitude / case.teacher_temperature * (dtype == torch.float64)
    floor = 64 * eps * (1 + sharp) * (1 + float(exact_gradient.abs().max() if case.N else 0))
    assert_at_most_twice_the_error("gradient", gradient, plain_gradient, exact_gradient, floor)
    operators.soft_cross_entropy_backward_(student, grad, *constants, *norms)
    assert torch.equal(student, gradient)


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: masked patches, and class tokens of local crops."""
    from dinov2_kernels.cross_entropy import triton_kernel

    for dtype in DTYPES:
        for N, M, J in ((4900, 4900, 0), (1280, 128, 2)):
            student = torch.empty(N, 65536, dtype=dtype, device="meta")
            teacher = torch.empty(M, 65536, dtype=dtype, device="meta")
            narrow = accumulation_dtype(student)
            index = torch.empty(N, J, dtype=torch.int64, device="meta") if J else None
            bias = torch.empty(65536, dtype=narrow, device="meta")
            weight = torch.empty(N, dtype=narrow, device="meta")
            arguments = (student, teacher, index, bias, weight, 0.1, 0.07)
            loss, *norms = triton_kernel.soft_cross_entropy(*arguments)
            yield triton_kernel.soft_cross_entropy_backward(loss, *arguments, *norms)
