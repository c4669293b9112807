"""The native CPU operators: every target this processor runs, values, threads, memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from dinov2_kernels import _library
from tests.cpu_targets import OTHER_TARGETS, run_python, run_value_tests
from tests.koleo.cases import (
    CASES,
    DTYPES,
    EPS,
    Case,
    assert_a_nan_is_farthest,
    assert_matches_reference,
    assert_ties_go_to_the_lowest,
    operators_of,
    random_rows,
)

native = operators_of(torch.ops.dinov2_kernels)
SHAPES = (
    Case(64, 8),  # a panel of AVX-512
    Case(128, 7, k=127),
    Case(131, 100),
    Case(299, 16, k=5, n_groups=13),
    Case(300, 16, k=2, n_groups=3),
    Case(211, 24, world_size=3, rank=1),
    Case(100, 24, k=2, n_groups=50, world_size=3, rank=2),
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[f"koleo_{name}"].has_native("cpu") for name in ("nearest", "forward", "backward"))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_ties(dtype: torch.dtype) -> None:
    assert_ties_go_to_the_lowest(native, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_nan(dtype: torch.dtype) -> None:
    assert_a_nan_is_farthest(native, dtype)


def test_values_around_whole_vectors_and_panels() -> None:
    for B in (15, 16, 17, 23, 24, 25, 63, 64, 65, 127, 128, 129):
        assert_matches_reference(native, Case(B, 5), torch.float32)


def test_many_rows() -> None:
    assert_matches_reference(native, Case(2000, 8), torch.float32)


def _results(case: Case, dtype: torch.dtype) -> list[Any]:
    x = case.rows(dtype)
    loss, index = native.forward(x, *case.arguments)
    everyone = torch.cat([native.forward(x, *case.arguments[:3], r, EPS)[1] for r in range(case.world_size)])
    grad = torch.ones(case.world_size, dtype=loss.dtype)
    return [loss, index, *native.nearest(x, *case.arguments), native.backward(grad, x, everyone, case.rank, EPS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [Case(1000, 384), Case(3000, 40, k=3), Case(1500, 70, n_groups=2, world_size=2, rank=1)], ids=str
)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_results(case, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_values_of_ties_with_threads() -> None:
    """Many equal rows far apart: no thread may prefer its own."""
    x = random_rows(50, 64, torch.float32).repeat(40, 1)
    index, cosine = native.nearest(x, 2, 1, 1, 0, EPS)
    first, second = torch.arange(2000) % 50, torch.arange(2000) % 50 + 50
    own = torch.arange(2000)
    assert torch.equal(index[:, 0], torch.where(own == first, second, first))
    assert torch.equal(index[:, 1], torch.where(own <= second, first + 100, second))
    assert torch.equal(cosine[:, 0], cosine[:, 1])


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)


PEAK_MEMORY = """
import torch, dinov2_kernels as dk
from pathlib import Path

def memory(name):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

torch.set_num_threads(2)
def step(x):
    return torch.autograd.grad(dk.koleo_loss(x), x)[0]
step(torch.randn(400, 64, requires_grad=True))  # starts the threads, loads the libraries
x = torch.randn(6000, 64, requires_grad=True)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
held = memory("VmRSS")
gradient = step(x)
print(memory("VmHWM") - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_has_no_matrix_of_cosines() -> None:
    run = run_python("-c", PEAK_MEMORY)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 6000 * 6000 * 4 / 20
