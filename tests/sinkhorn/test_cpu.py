"""The native CPU operators: every target this processor runs, values, threads, memory, and what they are made of."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import dinov2_kernels as dk
from dinov2_kernels import _library
from dinov2_kernels.sinkhorn import reference
from tests.cpu_targets import OTHER_TARGETS, run_python, run_value_tests
from tests.sinkhorn.cases import (
    CASES,
    DTYPES,
    Case,
    assert_infinite_and_missing_logits,
    assert_matches_reference,
    operators_of,
)

native = operators_of("dinov2_kernels")
SHAPES = (
    Case(8, 64),  # whole steps of every target
    Case(7, 1000),
    Case(257, 131),
    Case(3, 65537),
    Case(200, 15),  # fewer columns than lanes
    Case(9, 1024 + 17),  # a tile of columns and a bit
    Case(16, 2048, offset=3),
    Case(300, 1500),  # several tiles in several groups
    Case(24, 37, temperature=1e-11),  # logits beside which the log of a sum is nothing
)


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[f"sinkhorn_{name}"].has_native("cpu") for name in ("bias", "column_mass", "assign"))


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)


def _constant_rows() -> Tensor:
    return torch.linspace(-3, 3, 50)[:, None].expand(50, 333)


def _ties() -> Tensor:
    return torch.randn(40, 500, generator=torch.Generator().manual_seed(5)).round()


def _far_columns() -> Tensor:
    logits = torch.randn(33, 300, generator=torch.Generator().manual_seed(6))
    logits[:, ::7] -= 60  # exp(-60 / 0.07) is far below the smallest float
    return logits


def _far_rows() -> Tensor:
    return torch.randn(33, 300, generator=torch.Generator().manual_seed(7)) + torch.linspace(-60, 60, 33)[:, None]


def _every_half_precision_number() -> Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.float16).float()
    return numbers[numbers.isfinite()].view(-1, 256)  # subnormal numbers included


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("logits", [_constant_rows, _ties, _far_columns, _far_rows, _every_half_precision_number])
def test_values_of_special_logits(logits: object, dtype: torch.dtype, temperature: float) -> None:
    x = logits().to(dtype).contiguous()  # type: ignore[operator]

    class Given(Case):
        def logits(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
            return x

    given = Given(*x.shape, temperature=temperature, magnitude=float(x.abs().max()))
    assert_matches_reference(native, given, dtype)


def test_values_of_sums_over_many_rows() -> None:
    """Sums in plain float32 would lose a digit here and fail."""
    logits = torch.randn(20000, 40, generator=torch.Generator().manual_seed(8))
    bias = torch.zeros(40)
    exact = reference.column_mass(logits.double(), 1.0, bias.double())
    plain_error = (reference.column_mass(logits, 1.0, bias) - exact).abs().max()
    assert (native.column_mass(logits, 1.0, bias) - exact).abs().max() <= 2 * plain_error


def test_values_of_infinite_and_missing_logits() -> None:
    logits = torch.randn(20, 30)
    logits[:, 4] = -torch.inf
    logits[3, 5] = torch.nan
    assert native.column_logsumexp(logits, 0.07)[4] == -torch.inf
    assert native.column_logsumexp(logits, 0.07).isnan().nonzero().tolist() == [[5]]
    assignments = native.assign(logits, 0.07, torch.zeros(30))
    assert assignments.isnan().any(dim=1).nonzero().tolist() == [[3]]
    assert assignments[:3, 4].eq(0).all()
    assert native.column_mass(logits, 0.07, torch.zeros(30)).isnan().all()
    assert_infinite_and_missing_logits(native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [Case(200, 1000), Case(3, 70001), Case(5000, 40)], ids=str)
def test_values_are_the_same_for_every_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    logits = case.logits(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((dk.sinkhorn_bias(logits, 0.07), dk.sinkhorn_knopp(logits, 0.07)))
    finally:
        torch.set_num_threads(threads)
    for bias, assignments in results[1:]:
        assert torch.equal(bias, results[0][0])
        assert torch.equal(assignments, results[0][1])


@pytest.mark.parametrize("target", OTHER_TARGETS)
def test_every_other_target(target: str) -> None:
    """The value tests above, in a process that runs this target."""
    run_value_tests(__file__, target)


PEAK_MEMORY = """
import sys, torch, dinov2_kernels as dk
from pathlib import Path

def memory(name):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

torch.set_num_threads(2)
function = getattr(dk, sys.argv[1])
function(torch.randn(64, 65536)[:, :4096].contiguous(), 0.07)  # starts the threads, loads the libraries
logits = torch.randn(128, 65536)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
held = memory("VmRSS")
result = function(logits, 0.07)
print(memory("VmHWM") - held - result.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("function", ["sinkhorn_bias", "sinkhorn_knopp"])
def test_peak_memory_is_a_few_vectors(function: str) -> None:
    run = run_python("-c", PEAK_MEMORY, function)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 128 * 65536 * 4 / 20
