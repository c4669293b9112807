"""The page of a run says what was verified, how long everything took, which kernels won, and what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu.outcomes import Result
from gpu.summary import PhaseReport, table, write_summary

MACHINE = {"gpu": "NVIDIA H200", "date": "2027-01-02", "packages": {"torch": "2.11.0"}}
PHASES = [PhaseReport("smoke", 3.25, 25.0, 0), PhaseReport("tests", 150.1, 150.0, None), PhaseReport("step", 1, 2, 3)]
RESULTS = [
    Result("tests/koleo/test_gpu.py::test_values[triton-31x1]", "failed", 1.0, "Traceback\nloss: error 2, allowed 1"),
    Result("tests/koleo/test_gpu.py::test_values[native-31x1]", "passed"),
    Result("tests/residual/test_gpu.py::test_values[a]", "passed"),
    Result("tests/swiglu/test_gpu.py::test_values[a]", "not reached"),
]


def measured(group: str, milliseconds: float, **values: Any) -> dict[str, Any]:
    return {"group": group, "milliseconds": {"median": milliseconds}, "speedup": 2.0, "baseline_ms": 1.0, **values}


BENCHMARKS = {
    "benchmarks/koleo_gpu.py::test_both[64-koleo_loss, Triton]": measured(
        "KoLeo", 0.5, predicted_ms=0.25, floor_ms=0.1
    ),
    "benchmarks/koleo_gpu.py::test_both[64-koleo_loss, CUDA C++ forward]": measured("KoLeo", 0.25),
    "benchmarks/koleo_gpu.py::test_both[64-compiled]": measured("KoLeo", 0.75),
    "benchmarks/residual_gpu.py::test_stochastic_depth[384-stochastic_depth]": measured("depth", 0.1),
    "benchmarks/residual_gpu.py::test_stochastic_depth[384-compiled recipe]": measured("depth", 0.1, speedup=9.0),
}


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_summary(tmp_path / "summary.md", MACHINE, PHASES, RESULTS, BENCHMARKS, [])
    return (tmp_path / "summary.md").read_text()


def test_phases_and_verdicts(page: str) -> None:
    assert page.startswith("# NVIDIA H200, 2027-01-02\n\ntorch 2.11.0\n")
    for row in (
        "| smoke | 3.2 | 25 | ok |",
        "| tests | 150.1 | 150 | time was up |",
        "| step | 1.0 | 2 | exit status 3 |",
        "| koleo | native | yes | 1 | 0 | 0 | 0 |",
        "| koleo | triton | no | 0 | 1 | 0 | 0 |",
        "| swiglu | triton | no | 0 | 0 | 0 | 1 |",
    ):
        assert row in page.splitlines()


def test_times_stand_beside_floor_and_prediction(page: str) -> None:
    assert "| 64-koleo_loss, Triton | 0.5 | 1 | 2 | 0.1 | 0.25 | 2.00 |" in page.splitlines()
    assert "| 64-compiled | 0.75 | 1 | 2 |  |  |  |" in page.splitlines()


def test_the_ratio_of_both_kinds_of_kernels_and_whether_they_may_be_compared(page: str) -> None:
    (line,) = (line for line in page.splitlines() if line.startswith("- **koleo**"))
    assert "triton NOT verified, native verified" in line
    assert line.endswith(": 2.00.")


def test_a_failure_is_shown_by_its_last_line(page: str) -> None:
    assert "- `tests/koleo/test_gpu.py::test_values[triton-31x1]`: loss: error 2, allowed 1" in page.splitlines()


def test_the_table_has_the_speedups_of_our_own_kernels_alone() -> None:
    lines = {tuple(line.split()[:2]): line for line in table(RESULTS, BENCHMARKS).splitlines()}
    assert lines["residual", "triton"].endswith(" 2")
    assert lines["koleo", "native"].endswith(" 2")
