"""The native CPU operators: every target this processor runs, shared targets and many rows, threads, memory."""

from __future__ import annotations

import sys

import pytest
import torch

from dinov2_kernels import _library, soft_cross_entropy
from tests.cpu_targets import OTHER_TARGETS, run_python, run_value_tests
from tests.cross_entropy.cases import CASES, DTYPES, Case, assert_matches_reference

native = torch.ops.dinov2_kernels
SHAPES = (
    Case(3, 2, 64),  # whole vectors of every target
    Case(4, 3, 15),  # fewer columns than lanes
    Case(40, 5, 2048 + 17, shared=True),  # groups of more than 8 students; a tile of columns and a bit
    Case(5000, 37, 11, J=2),
    Case(3, 3, 65537, J=0),
    Case(2, 2, 131071, J=2),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[f"soft_cross_entropy{name}"].has_native("cpu") for name in ("", "_backward"))
    assert _library.OPERATORS["soft_cross_entropy_backward_"].has_native("cpu")


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("teacher", DTYPES[1:], ids=str)
@pytest.mark.parametrize("student", DTYPES[1:], ids=str)
def test_values_of_two_dtypes(student: torch.dtype, teacher: torch.dtype) -> None:
    assert_matches_reference(native, Case(7, 4, 1000, J=2), student, teacher_dtype=teacher)


def test_values_of_rising_logits() -> None:
    """Maxima that rise from tile to tile: every sum so far is scaled down again and again, sometimes to 0."""
    K = 3 * 2048 + 5
    rising = torch.linspace(-30, 30, K, dtype=torch.float64)
    student, teacher = torch.stack([rising, rising.flip(0)]), torch.stack([rising, rising.flip(0)])
    index = torch.tensor([[0, 1], [1, 1]])
    arguments = (index, None, None, 0.1, 0.07)
    exact = torch.ops.dinov2_kernels.soft_cross_entropy(student, teacher, *arguments)[0]
    targets = torch.softmax(teacher / 0.07, dim=1)[index].sum(dim=1)
    torch.testing.assert_close(exact, -(targets * torch.log_softmax(student / 0.1, dim=1)).sum(dim=1))
    single = torch.ops.dinov2_kernels.soft_cross_entropy(student.float(), teacher.float(), *arguments)[0]
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-4)


def test_values_of_missing_logits() -> None:
    arguments = Case(4, 4, 100, J=0).arguments(torch.float32)
    arguments[0][1, 50] = torch.nan
    arguments[1][2, 7] = torch.nan
    loss, *norms = native.soft_cross_entropy(*arguments)
    assert loss.isnan().tolist() == [False, True, True, False]
    gradient = native.soft_cross_entropy_backward(torch.ones(4), *arguments, *norms)
    assert gradient.isnan().any(dim=1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(200, 50, 1000, J=2), Case(3, 3, 70001, J=0), Case(5000, 3, 40)], ids=str)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss, *norms = native.soft_cross_entropy(*arguments)
            gradient = native.soft_cross_entropy_backward(torch.ones_like(loss), *arguments, *norms)
            results.append((loss, *norms, gradient))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("row", [-1, 3, 10**6])
def test_a_compiled_call_checks_the_rows_of_teachers(row: int) -> None:
    """Python cannot check them under torch.compile, and the kernels would read beyond the teachers."""
    index, temperatures = torch.tensor([0, row, 2, 1]), {"student_temperature": 0.1, "teacher_temperature": 0.07}
    loss = torch.compile(soft_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"teacher_index: expected rows from 0 to 2, got {row}"):
        loss(torch.randn(4, 8), torch.randn(3, 8), teacher_index=index, **temperatures)


PEAK_MEMORY = """
import sys, torch, dinov2_kernels as dk
from pathlib import Path

def memory(name):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

def step(student, teacher, index):
    loss = dk.soft_cross_entropy(
        student, teacher, student_temperature=0.1, teacher_temperature=0.07, teacher_index=index,
        overwrite_student_logits=sys.argv[1] == "overwrite",
    )
    return torch.autograd.grad(loss.sum(), student)  # backward() would copy it into a leaf's grad

torch.set_num_threads(2)
zero = torch.zeros((), requires_grad=True)  # makes logits that a layer might have made
step(torch.randn(64, 512) + zero, torch.randn(8, 512), torch.arange(64) % 8)  # starts the threads
student, teacher = torch.randn(256, 65536) + zero, torch.randn(32, 65536)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
held = memory("VmRSS")
step(student, teacher, torch.arange(256) % 32)
print(memory("VmHWM") - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("where", "gradients"), [("fresh", 1), ("overwrite", 0)])
def test_peak_memory_is_that_of_the_gradient(where: str, gradients: int) -> None:
    run = run_python("-c", PEAK_MEMORY, where)
    assert run.returncode == 0, run.stderr
    size = 256 * 65536 * 4
    assert int(run.stdout) <= gradients * size + size / 20


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)
