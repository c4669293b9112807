"""The native CPU operators: every target this processor runs, values, threads, memory of a whole step."""

from __future__ import annotations

import sys

import pytest
import torch

import dinov2_kernels as dk
from dinov2_kernels import _library, prototype_cross_entropy
from dinov2_kernels.prototype_cross_entropy import reference
from tests.cpu_targets import OTHER_TARGETS, run_python, run_value_tests
from tests.prototype_cross_entropy.cases import (
    CASES,
    DTYPES,
    Case,
    assert_matches_reference,
    chunk_arguments,
    gradients_of,
    run_chunk_operator,
)

native = torch.ops.dinov2_kernels
SHAPES = (
    Case(16, 16, 64, J=0),  # whole vectors of every target
    Case(64, 9, 15, J=2),  # fewer columns than lanes
    Case(3, 2, 1024 + 17, J=2),  # a tile and a bit
    Case(100, 30, 333),  # rows of several threads
    Case(5, 5, 4096, J=0, offset=3),
    Case(40, 40, 512, J=0, magnitude=1e4),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    operators = [x for name, x in _library.OPERATORS.items() if name.startswith("prototype_") and x.composite is None]
    assert len(operators) == 4
    assert all(operator.has_native("cpu") for operator in operators)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_values_of_missing_and_infinite_logits(dtype: torch.dtype) -> None:
    """NaN stays in its row; a prototype at -inf gets nothing."""
    arguments = chunk_arguments(Case(6, 6, 50, J=0), dtype)
    logits, complete, targets, index, scale, T = arguments["prototype_gradient_"]
    logits[2, 7] = torch.nan
    logits[4, 9] = -torch.inf
    state, *_ = arguments["prototype_accumulate_"]
    native.prototype_accumulate_(state, logits, targets, index, T)
    assert state[1].isnan().nonzero().tolist() == [[2]]
    expected = -scale[4] * targets[4, 9]
    native.prototype_gradient_(logits, complete, targets, index, scale, T)
    assert logits.isnan().nonzero().tolist() == [[2, 7]]
    torch.testing.assert_close(logits[4, 9], expected.to(dtype))
    teacher, bias, teacher_T = arguments["prototype_target_norm"]
    teacher[1, 3] = -torch.inf
    norm = native.prototype_target_norm(teacher, bias, teacher_T)
    native.prototype_targets_(targets, teacher, bias, norm, teacher_T)
    assert targets[1, 3] == 0
    torch.testing.assert_close(targets.sum(dim=1), torch.ones_like(targets[:, 0]))


def test_values_of_sums_over_many_columns() -> None:
    """Sums in plain float32 would lose a digit here and fail."""
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(2, 1, 2**20, generator=generator)
    targets = targets.softmax(dim=1)
    results = []
    for operators, wide in ((native, False), (reference, False), (reference, True)):
        inputs = [x.double() if wide else x for x in (logits, targets)]
        state = reference.initial_state(1, inputs[0])
        operators.prototype_accumulate_(state, *inputs, None, 1.0)
        results.append(state.double())
    native_error, plain_error = ((x - results[2]).abs() / results[2].abs() for x in results[:2])
    assert (native_error <= 2 * plain_error + 2e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [Case(200, 150, 1000, J=2), Case(3, 3, 70001, J=0), Case(5000, 5000, 40, J=0)], ids=str
)
def test_bits_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    """The kernels are deterministic; a whole loss is as deterministic as torch.mm."""
    arguments = chunk_arguments(case, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([run_chunk_operator(native, name.partition(" ")[0], x) for name, x in arguments.items()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_step_is_the_same_every_time() -> None:
    arguments = Case(65, 33, 5001, 16, J=2).loss_arguments(torch.float32, gain=True)
    steps = []
    for _ in range(3):
        loss = prototype_cross_entropy(**arguments)
        steps.append([loss.detach(), *gradients_of(loss, arguments).values()])
    for step in steps[1:]:
        assert all(torch.equal(a, b) for a, b in zip(steps[0], step, strict=True))


def test_use_backend_reaches_the_operators_inside() -> None:
    arguments = Case(6, 4, 37, J=2).loss_arguments(torch.float32)
    expected = prototype_cross_entropy(**arguments)
    with dk.use_backend("native"):
        assert torch.equal(prototype_cross_entropy(**arguments), expected)
    # info() tells what runs where a kernel runs: in the parts.
    assert {name for name in dk.info()["operators"] if name.startswith("prototype_")} == {
        "prototype_accumulate_",
        "prototype_gradient_",
        "prototype_target_norm",
        "prototype_targets_",
    }


@pytest.mark.parametrize("row", [-1, 3, 10**6])
def test_a_compiled_call_checks_the_rows_of_teachers(row: int) -> None:
    """Python cannot check them under torch.compile, and the kernels would read beyond the teachers."""
    index, temperatures = torch.tensor([0, row, 2, 1]), {"student_temperature": 0.1, "teacher_temperature": 0.07}
    loss = torch.compile(prototype_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"teacher_index: expected rows from 0 to 2, got {row}"):
        loss(torch.randn(4, 5), torch.randn(8, 5), torch.randn(3, 8), teacher_index=index, **temperatures)


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)


PEAK_MEMORY = """
import torch, dinov2_kernels as dk
from pathlib import Path

def memory(name):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

def step(N, K):
    features, weight = torch.randn(N, 64, requires_grad=True), torch.randn(K, 64, requires_grad=True)
    teacher_logits = torch.randn(N, K)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    held = memory("VmRSS")
    dk.prototype_cross_entropy(
        features, weight, teacher_logits, student_temperature=0.1, teacher_temperature=0.07
    ).sum().backward()
    return memory("VmHWM") - held - weight.nbytes

torch.set_num_threads(2)
step(512, 2048)  # starts the threads, loads the libraries
print(step(512, 65536))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_a_chunk() -> None:
    """Forward and backward, beside the gradient of weight, where logits alone would take 134 MB."""
    run = run_python("-c", PEAK_MEMORY)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 24e6
